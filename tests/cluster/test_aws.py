"""cluster/aws.yaml and aws-roles.yaml on an AWS in this process (moto): the stack is created, and Ray's own AWS
provider starts a node of every group with its roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boto3
import pytest
from cfnlint.api import lint_all
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

from tests.cluster.files import CLUSTER, launcher

TEMPLATE = (CLUSTER / "aws-roles.yaml").read_text()
ACCOUNT, AMI, REGION = "123456789012", "ami-03cf127a", "us-west-2"  # moto's


def problems(template: str) -> list[str]:
    return [str(found) for found in lint_all(template) if found.rule.severity != "informational"]


def test_the_template_is_valid() -> None:
    assert problems(TEMPLATE) == []
    for good, bad in (("AWS::IAM::Role", "AWS::IAM::Rolle"), ("RoleName:", "Rolename:"), ("Effect:", "Efect:")):
        assert problems(TEMPLATE.replace(good, bad)), bad


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(variable, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray stores the key pair there
    with mock_aws():
        client = boto3.client("cloudformation")
        parameters = [{"ParameterKey": "Bucket", "ParameterValue": "runs"}]
        client.create_stack(
            StackName="rcd-roles", TemplateBody=TEMPLATE, Parameters=parameters, Capabilities=["CAPABILITY_NAMED_IAM"]
        )
        (found,) = client.describe_stacks(StackName="rcd-roles")["Stacks"]
        yield {output["OutputKey"]: output["OutputValue"] for output in found["Outputs"]}


def test_a_node_of_every_group_starts(stack: dict[str, str]) -> None:
    filled = json.dumps(launcher("aws")).replace("ACCOUNT", ACCOUNT).replace('"AMI"', f'"{AMI}"')
    config = bootstrap_aws(prepare_config(json.loads(filled)))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    ec2 = boto3.client("ec2")
    for name, group in config["available_node_types"].items():
        kind = "head" if name == config["head_node_type"] else "worker"
        tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_NODE_NAME: name, TAG_RAY_USER_NODE_TYPE: name}
        (started,) = provider.create_node(group["node_config"], tags, 1)
        (instance,) = ec2.describe_instances(InstanceIds=[started])["Reservations"][0]["Instances"]
        assert instance["IamInstanceProfile"]["Arn"] == stack["HeadProfile" if kind == "head" else "WorkerProfile"]
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert (instance.get("InstanceLifecycle") == "spot") == name.endswith("_spot")
        # What the head's policy lets it stop is what has Ray's tag.
        assert {"Key": "ray-cluster-name", "Value": config["cluster_name"]} in instance["Tags"]


def test_only_the_head_may_start_nodes(stack: dict[str, str]) -> None:
    iam = boto3.client("iam")
    for role, may in (("rcd-head", True), ("rcd-worker", False)):
        inline = [iam.get_role_policy(RoleName=role, PolicyName=name) for name in _names(iam, role)]
        attached = iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
        documents = [one["PolicyDocument"] for one in inline]
        for policy in attached:
            version = iam.get_policy(PolicyArn=policy["PolicyArn"])["Policy"]["DefaultVersionId"]
            documents.append(
                iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId=version)["PolicyVersion"]["Document"]
            )
        text = json.dumps(documents)
        assert ("ec2:RunInstances" in text) == ("iam:PassRole" in text) == may
        assert "arn:aws:s3:::runs/*" in text and "ecr:BatchGetImage" in text and '"s3:*"' not in text


def _names(iam: Any, role: str) -> list[str]:
    return list(iam.list_role_policies(RoleName=role)["PolicyNames"])
