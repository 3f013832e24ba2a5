"""Formats of files that are told by how they begin, so that a refusal can say what a file is."""

import re
import struct
from collections.abc import Sequence

START = 4096  # bytes that are looked at

MAGIC = (
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it (.h5)"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF-", "a PDF document"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"PK\x05\x06", "an empty zip archive"),
)
IDX_TYPES = (8, 9, 11, 12, 13, 14)  # the third byte of an idx file; the fourth counts dimensions


def recognise(start: bytes, size: int) -> str:
    """What a file of `size` bytes is by the first `START` of them; "" where it is not known, or is
    a zip archive or a pickle, of which more has to be read."""
    for magic, name in MAGIC:
        if start.startswith(magic):
            return name
    if start[:2] == b"\0\0" and start[2:3] and start[2] in IDX_TYPES and 1 <= start[3] <= 4:
        return "an idx file, as MNIST has them: examples or labels"
    if start[257:262] == b"ustar":
        return "a tar archive, as torch before 0.1.10 wrote them"
    if _is_safetensors(start, size):
        return "a safetensors file; load it with safetensors and torch.save its tensors"
    return "an ONNX model" if _is_onnx(start, size) else ""


def recognise_archive(names: Sequence[str]) -> str:
    """What a zip archive is by the names in it; "" where it may be a file of torch.save."""
    inside = {name.partition("/")[2] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz); torch.save a dict of tensors made of them"
    if "data.pkl" in inside and ("constants.pkl" in inside or any(map(_is_code, inside))):
        return "a TorchScript module; torch.save its tensors as w1, b1, ..."
    if "model.weights.h5" in names:
        return "a Keras model (.keras)"
    if "[Content_Types].xml" in names:
        return "an Office document"
    return ""


def _is_code(name: str) -> bool:
    return name.startswith("code/")


def _is_safetensors(start: bytes, size: int) -> bool:
    """Eight bytes with the length of a JSON object, and the object."""
    if len(start) < 10 or not re.match(rb'\{\s*("|\})', start[8:]):
        return False
    (length,) = struct.unpack("<Q", start[:8])
    return 2 <= length <= size - 8


def _is_onnx(start: bytes, size: int) -> bool:
    """A protobuf message that begins as ModelProto does: field 1, a small version, then a field of
    bytes (2 to 5: texts, 7: the graph, 8: the operators) that ends within the file."""
    if len(start) < 4 or start[0] != 0x08 or not 1 <= start[1] <= 32:
        return False
    field, kind = start[2] >> 3, start[2] & 7
    if field == 5 and kind == 0:  # model_version, a number
        return True
    length, shift = 0, 0
    for place, byte in enumerate(start[3:13], 4):
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return kind == 2 and field in (2, 3, 4, 6, 7, 8) and place + length <= size
    return False
