"""Recognises files that are not checkpoints, by their first bytes."""

import re
from pathlib import Path

SIGNATURES = {  # first bytes of other file formats
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (git lfs pull gets it)",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes",
    b"model_checkpoint_path": "the list of checkpoints of TensorFlow",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "packed by gzip: unpack it first",
    b"BZh": "packed by bzip2: unpack it first",
    b"\xfd7zXZ\0": "packed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"<?xml": "an XML document, such as the error of a download",
    b"<html": "a web page, such as the error of a download",
    b"<!doctype html": "a web page, such as the error of a download",
}
FILE_NAMES = {
    r"\.onnx$": "an ONNX model",
    r"\.safetensors$": "a safetensors file",
    r"\.pb$|\.index$|\.data-\d+-of-\d+$": "a TensorFlow file",
    r"\.tar$": "a tar archive: unpack it first",
}


def describe_kind(path: Path, head: bytes) -> str:
    """What a file that is not a checkpoint is, by its first bytes and its name.

    Returns the end of a sentence: "it is ...".
    """
    if not head:
        return "empty"
    if head.startswith((b"PK\3\4", b"\x80")):
        return "damaged, or cut short"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature) or text.startswith(signature):
            return kind
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 2**30:
        return "a safetensors file, which is not supported: convert it to a .pth"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if re.match(rb"\x08[\x03-\x1f]\x12[\x01-\x40][ -~]", head):
        return "an ONNX model"
    for pattern, kind in FILE_NAMES.items():
        if re.search(pattern, path.name.lower()):
            return f"{kind}, by its name"
    if not head.strip(b"\0"):
        return "nothing but zeros where it begins, as if a download was not finished"
    decoded = head.decode("utf-8", "ignore")
    if len(decoded.encode()) > len(head) - 4 and all(
        character.isprintable() or character.isspace() for character in decoded
    ):
        return f"text, beginning with {decoded.split(chr(10))[0].strip()[:40]!r}"
    return "damaged, or another kind of file"
