"""Weights by name: a path, an https address, or a file of the official model zoos.

    find_weights("runs/toy/last.pt")                        # a path is returned as it is
    find_weights("https://example.org/tracker-1a2b3c4d.pt") # downloaded once, then from the cache
    find_weights("grattvis_r50_ovis.pth")                   # official: says where to get it

Downloads lie in torch.hub's folder, torch.hub.get_dir()/checkpoints (TORCH_HOME moves it). Once a
file is there, the network is not used. A digest in the file name (-<hexadecimal digits>.pt, as
torch.hub has it) is compared with the SHA-256 of the contents.
"""

import hashlib
import os
import re
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from tqdm import tqdm

from runtime.errors import InputError

# Google Drive ids of the official checkpoints: READMEs of Tanveer81/GRAttVIS and sukjunhwang/VITA.
# VITA's are where training of GRAtt-VIS starts. Drive offers no direct download of large files.
OFFICIAL = {
    "grattvis_r50_ytvis2019.pth": "1Uzi9SAIxvbLTvOGulxt0UsDscmJxsQnV",
    "grattvis_swin_ytvis2019.pth": "1Spvy7UOjOWuyNmxqe4ej3s1kGU-EAU6v",
    "grattvis_r50_ytvis2021.pth": "1fKVbgwjWQFVS5hrO5bCo4gnz_TeG7jWT",
    "grattvis_swin_ytvis2021.pth": "1ov-vMx-OQtR5noCX5Vk6AqQo7vRD_rNB",
    "grattvis_r50_ytvis2022.pth": "1zbsdqFaiZVU21qyTUlMZhEH7hh0k-GWl",
    "grattvis_swin_ytvis2022.pth": "1Lk0Au8_OqzfFCTBW5OGwW_v1czodAuOI",
    "grattvis_r50_ovis.pth": "1YGHH4sHWC-qxb24p0i1ywr4kQu0bDALt",
    "grattvis_swin_ovis.pth": "1w-0hDcWUOH9xCIl0PcDLiusoE0ZXYBKB",
    "vita_r50_coco.pth": "1bCkxJreuOOO5Dw77PNnE8oeGaykikDW1",
    "vita_r101_coco.pth": "1I9GyLk8did3A3pgD7FSG9k1fYd8tgFJJ",
    "vita_swin_coco.pth": "1AkP5LHQfRxFltAbDVWlLPkylEIRsdSwm",
    "vita_r50_ytvis2019.pth": "11bJlEGEzjWNqX_Z57Z812F0vBbKDSSP7",
    "vita_swin_ytvis2019.pth": "1w9qEH_JRBtBlbeeOC3bVrxyYarwWkBfF",
    "vita_r50_ytvis2021.pth": "17HJtaiBGCJu4xKMfwkvZ_YNJg5j2cOl0",
    "vita_swin_ytvis2021.pth": "1zwzFBtqX9DkWHric8TRveGTUBWk-Ix0G",
    "vita_r50_ovis.pth": "1BHx5rRTKqtsQSuHOeCShEzxjpb1aLJ4t",
    "vita_swin_ovis.pth": "1AmpmjNwPHRoYs0HOIKNrNv6FNUKBUi2Y",
}
DRIVE = "https://drive.google.com/file/d/{}/view"
DIGEST = re.compile(r"-([a-f0-9]{8,64})\.\w+$")
CHUNK = 2**20  # bytes


def find_weights(name: str | Path) -> Path:
    """The path of a file of weights. InputError if it does not exist and cannot be downloaded."""
    if str(name).startswith("https://"):
        return download(str(name))
    path = Path(name)
    official = OFFICIAL.get(path.name) or OFFICIAL.get(f"{path.name}.pth")
    if path.exists() or not official:
        return path
    raise InputError(
        f"{path} does not exist: it is an official checkpoint; download it in a browser "
        f"from {DRIVE.format(official)} and save it as {path.with_suffix('.pth')}"
    )


def download(url: str) -> Path:
    """Download a file of weights to the cache, or find it there."""
    name = Path(unquote(urlsplit(url).path)).name
    if not name:
        raise InputError(f"{url} names no file")
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{name}.{os.getpid()}.part")  # each process of a run has its own
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            expected = int(response.headers.get("Content-Length") or 0)
            digest = save_stream(response, temporary, expected, name)
        check_download(url, temporary.stat().st_size, expected, digest)
        os.replace(temporary, path)
    except OSError as error:  # includes urllib's URLError
        reason = getattr(error, "reason", error)
        raise InputError(
            f"{url} cannot be downloaded: {reason}; to work offline, put the file into "
            f"{path.parent}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def save_stream(response, target: Path, size: int, name: str) -> str:
    """Write a response to a file with a progress bar; returns its SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with (
        open(target, "wb") as file,
        tqdm(total=size or None, desc=name, unit="B", unit_scale=True, unit_divisor=1024) as bar,
    ):
        while chunk := response.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def check_download(url: str, size: int, expected_size: int, digest: str) -> None:
    """InputError if a download is incomplete, or has another digest than its name says."""
    if expected_size and size != expected_size:
        raise InputError(f"{url} has {expected_size} bytes, of which {size} arrived: try again")
    named = DIGEST.search(urlsplit(url).path)
    if named and not digest.startswith(named[1]):
        raise InputError(
            f"{url} has the SHA-256 {digest}, but its name promises {named[1]}: the file "
            "is damaged or was replaced"
        )
