"""Lay a bundle's files out as asset packs of Google Play."""

from __future__ import annotations

import re
from collections.abc import Mapping

_GRADLE = "build.gradle.kts"


def fill(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names of files by pack: the largest first, each into the first pack that has room.

    Args:
        sizes: bytes by name, none more than a pack holds.
        most: bytes that a pack holds.
    """
    packs: list[list[str]] = []
    room: list[int] = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        number = next((i for i, left in enumerate(room) if left >= sizes[name]), len(packs))
        if number == len(packs):
            packs.append([])
            room.append(most)
        packs[number].append(name)
        room[number] -= sizes[name]
    return packs


def pack_name(bundle: str, number: int) -> str:
    """A bundle's name as Google Play takes it: letters, digits and underscores, a letter first."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", bundle).strip("_")
    name = name if re.match("[A-Za-z]", name) else f"bundle_{name}".rstrip("_")
    return f"{name}_{number}"


def asset_path(pack: str, name: str) -> str:
    """Where a file of a pack lies below the package's folder."""
    return f"packs/{pack}/src/main/assets/{name}"


def module_files(pack: str, delivery: str) -> dict[str, str]:
    """By path, what makes a pack's folder a module of the Android Gradle plugin."""
    script = f"""plugins {{
    id("com.android.asset-pack")
}}

assetPack {{
    packName.set("{pack}")
    dynamicDelivery {{
        deliveryType.set("{delivery}")
    }}
}}
"""
    return {f"packs/{pack}/{_GRADLE}": script}
