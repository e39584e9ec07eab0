"""Decoding: one engine for evaluation, the command line and Serve."""

from rcd_core.decoding.engine import Decoder, Engine
from rcd_core.decoding.reference import LocalReference, Reference, WarmStart
from rcd_core.decoding.sequence import Generation
from rcd_core.decoding.settings import DecodeSettings

__all__ = ["DecodeSettings", "Decoder", "Engine", "Generation", "LocalReference", "Reference", "WarmStart"]
