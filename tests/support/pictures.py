"""Real images, as files in memory: scikit-learn's photographs, cut and stored in several ways."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image


def photograph(name: str) -> Image.Image:
    """ "china" or "flower", 640 × 427 pixels."""
    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file of that kind: "JPEG", "PNG", …"""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures() -> list[bytes]:
    """Twelve files: sizes, shapes and modes as users send them."""
    china, flower = photograph("china"), photograph("flower")
    tall, wide = china.crop((100, 0, 300, 427)), flower.crop((0, 100, 640, 220))
    return [
        encoded(china, "JPEG"),
        encoded(flower, "JPEG", quality=60),
        encoded(tall, "JPEG", progressive=True),
        encoded(wide, "PNG"),
        encoded(china.convert("L"), "JPEG"),
        encoded(flower.convert("CMYK"), "JPEG"),
        encoded(china.resize((97, 53)), "PNG"),
        encoded(flower.convert("RGBA"), "PNG"),
        encoded(china.convert("P"), "PNG"),
        encoded(flower.convert("1"), "PNG"),
        encoded(flower.rotate(180), "JPEG", subsampling=0),
        encoded(china.crop((0, 0, 3, 2)), "PNG"),
    ]


def bomb() -> bytes:
    """A PNG of 220 KB with 15,000 × 15,000 pixels, 225 MB when decoded."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    header = struct.pack(">IIBBBBB", 15_000, 15_000, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(15_001)
    rows = b"".join(packer.compress(row * 100) for _ in range(150)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def damaged(data: bytes, seed: int) -> bytes:
    """The file with sixteen bytes changed, or cut off."""
    generator = np.random.default_rng(seed)
    changed = bytearray(data)
    for place in generator.integers(0, len(changed), 16):
        changed[place] = generator.integers(256)
    return bytes(changed[: int(generator.integers(8, len(changed)))] if seed % 2 else changed)
