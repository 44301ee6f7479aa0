import hashlib

import pytest
import torch
import xxhash

from dit_qat.export.digests import DIGESTS, digest_for, digest_of


def test_the_digest_of_nothing_is_the_published_one() -> None:
    empty = torch.empty(0, 3)
    assert digest_of(empty, "xxh3_128") == "99aa06d3014798d86001c324468d497f"
    assert digest_of(empty, "sha256") == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_it_is_of_the_bytes_in_rows_wherever_they_lie(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    data = tensor.flatten().view(torch.uint8).numpy().tobytes()
    for own in (tensor, tensor.t().contiguous().t(), tensor.clone().requires_grad_(False)):
        assert digest_of(own, "sha256") == hashlib.sha256(data).hexdigest()
        assert digest_of(own, "xxh3_128") == xxhash.xxh3_128(data).hexdigest()


@pytest.mark.parametrize("name", [*DIGESTS])
def test_any_bit_changes_it(name: str) -> None:
    tensor = torch.arange(40, dtype=torch.uint8)
    seen = {digest_of(tensor, name)}
    for bit in range(8 * len(tensor)):
        flipped = tensor.clone()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(digest_of(flipped, name))
    assert len(seen) == 8 * len(tensor) + 1


def test_versions_have_one_each() -> None:
    assert [digest_for(version) for version in (1, 2, 3, 4)] == [*["sha256"] * 3, "xxh3_128"]
