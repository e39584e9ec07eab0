"""The fields of KubeRay's resources and of Kubernetes' own that cluster/kuberay uses, with the types that they have.

Written from the reference of KubeRay 1.7 (RayCluster, RayJob, RayService of ray.io/v1); pods, claims and accounts are
of Kubernetes' v1. Kubernetes drops a field that it does not know without a word; here it is a mistake. {...: x}: any
key with a value of x; [x]: a list; (a, b): one of these values. `!` after a name: it has to be there.
"""

from __future__ import annotations

from typing import Any

QUANTITY = ("quantity",)  # 500m, 1, 16Gi
Fields = dict[Any, Any]

SECURITY: Fields = {
    "allowPrivilegeEscalation": bool,
    "runAsNonRoot": bool,
    "capabilities": {"drop": [str]},
    "seccompProfile": {"type!": ("RuntimeDefault", "Localhost")},
}
RESOURCES: Fields = {"requests": {...: QUANTITY}, "limits": {...: QUANTITY}}
PROBE: Fields = {
    "httpGet!": {"path!": str, "port!": int},
    "initialDelaySeconds": int,
    "periodSeconds": int,
    "timeoutSeconds": int,
    "failureThreshold": int,
}
CONTAINER: Fields = {
    "name!": str,
    "image!": str,
    "imagePullPolicy": ("IfNotPresent", "Always"),
    "resources": RESOURCES,
    "ports": [{"name": str, "containerPort!": int}],
    "env": [{"name!": str, "value": str, "valueFrom": {"secretKeyRef": {"name!": str, "key!": str}}}],
    "startupProbe": PROBE,
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
    "securityContext": SECURITY,
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
POD: Fields = {
    "serviceAccountName": str,
    "securityContext": {"runAsUser": int, "runAsGroup": int, "fsGroup": int, "runAsNonRoot": bool},
    "nodeSelector": {...: str},
    "tolerations": [{"key": str, "operator": ("Exists", "Equal"), "effect": ("NoSchedule", "NoExecute")}],
    "restartPolicy": ("Never", "OnFailure"),
    "containers!": [CONTAINER],
    "volumes": [
        {"name!": str, "persistentVolumeClaim": {"claimName!": str}, "emptyDir": {"sizeLimit": QUANTITY, "medium": str}}
    ],
}
TEMPLATE: Fields = {"spec!": POD}
CLUSTER: Fields = {
    "rayVersion": str,
    "authOptions": {"mode": ("token", "disabled"), "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": ("v1", "v2"),
        "idleTimeoutSeconds": int,
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "resources": RESOURCES,
        "securityContext": SECURITY,
    },
    "headGroupSpec!": {
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
        "rayStartParams": {...: str},
        "resources": {...: str},
        "template!": TEMPLATE,
    },
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "idleTimeoutSeconds": int,
            "priority": int,
            "resources": {...: str},
            "rayStartParams": {...: str},
            "template!": TEMPLATE,
        }
    ],
}
SPECS: Fields = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "preRunningDeadlineSeconds": int,
        "submissionMode": ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
        "submitterPodTemplate": TEMPLATE,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {
        "serveConfigV2": str,
        "rayClusterDeletionDelaySeconds": int,
        "upgradeStrategy": {"type": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")},
        "rayClusterConfig": CLUSTER,
    },
    "PersistentVolumeClaim": {
        "accessModes!": [("ReadWriteMany", "ReadWriteOnce")],
        "storageClassName": str,
        "resources!": {"requests!": {"storage!": QUANTITY}},
    },
}
VERSIONS = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "RayService": "ray.io/v1"}
