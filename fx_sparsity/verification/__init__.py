"""What is true now: how a model stores its weights, and whether what was masked is zero."""

from fx_sparsity.verification.aoti_constants import Pt2Error
from fx_sparsity.verification.gate import SparsityLostError, Verification, VerifiedWeight, verify
from fx_sparsity.verification.onnx_file import OnnxError
from fx_sparsity.verification.openvino_file import OpenVinoError
from fx_sparsity.verification.read import READERS, read_weights
from fx_sparsity.verification.stored import StoredWeight, ZeroNotRepresentableError

__all__ = [
    "READERS",
    "OnnxError",
    "OpenVinoError",
    "Pt2Error",
    "SparsityLostError",
    "StoredWeight",
    "Verification",
    "VerifiedWeight",
    "ZeroNotRepresentableError",
    "read_weights",
    "verify",
]
