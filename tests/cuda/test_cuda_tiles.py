"""Index arithmetic of the tensor-core kernels (csrc/cuda/tiles.cuh), run on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable

import emulated
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="CUDA emulation: no C++ compiler")


def test_the_swizzle_is_the_copy_engines() -> None:
    """PTX ISA, 128-byte swizzle: address bits 4 to 6 become their exclusive or with bits 7 to 9."""
    places = set()
    for row in range(256):
        for chunk in range(8):
            plain = row * 128 + chunk * 16
            place = emulated.library().tile_offset(row, chunk)
            assert place == plain ^ (plain >> 7 & 7) << 4
            places.add(place)
    assert len(places) == 256 * 8


def test_eight_rows_of_one_chunk_are_in_different_banks() -> None:
    """So ldmatrix reads eight rows, and cp.async writes a row's eight chunks, without a conflict."""
    for first in range(0, 128, 8):
        for chunk in range(8):
            banks = {emulated.library().tile_offset(first + row, chunk) % 128 for row in range(8)}
            assert len(banks) == 8


def test_the_descriptor_has_its_fields() -> None:
    descriptor = emulated.library().tile_descriptor
    descriptor.restype = emulated.ctypes.c_ulong
    for address in (0, 1024, 49152 * 4 + 16384 + 8192):
        bits = descriptor(address)
        assert (bits & 0x3FFF) << 4 == address
        assert bits >> 32 & 0x3FFF == 1024 >> 4 and bits >> 49 & 7 == 0 and bits >> 62 == 1
        # Sixteen elements further along K: 32 bytes, inside the swizzled 128.
        for step in range(4):
            assert ((bits + 2 * step) & 0x3FFF) << 4 == address + 32 * step
            assert (bits + 2 * step) >> 16 == bits >> 16


def swizzled_tile(tile: Tensor) -> Tensor:
    """A tile [rows, 64] as the copy engine leaves it in shared memory, by 2-byte elements."""
    memory = torch.zeros(tile.numel(), dtype=tile.dtype)
    for row in range(tile.shape[0]):
        for chunk in range(8):
            place = emulated.library().tile_offset(row, chunk) // 2
            memory[place : place + 8] = tile[row, chunk * 8 : chunk * 8 + 8]
    return memory


@pytest.mark.parametrize("first_row", [0, 64])
def test_wgmma_finds_its_operand_by_the_descriptor(first_row: int) -> None:
    """As the PTX manual has it read: rows of a group of eight 128 bytes apart, groups as the descriptor says, address
    bits 4 to 6 swizzled with 7 to 9."""
    tile = torch.arange(128 * 64).view(128, 64)
    memory, descriptor = swizzled_tile(tile), emulated.library().tile_descriptor
    descriptor.restype = emulated.ctypes.c_ulong
    bits = descriptor(first_row * 128)
    for step in range(4):
        start, group = ((bits + 2 * step) & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4
        for row in range(64):
            for k in range(16):
                address = start + row // 8 * group + row % 8 * 128 + 2 * k
                address ^= (address >> 7 & 7) << 4
                assert memory[address // 2] == tile[first_row + row, 16 * step + k]


def load_matrices(memory: Tensor, offset: Callable[..., int], first: int, k: int) -> Tensor:
    """ldmatrix.x4: what each lane has in its four registers of two elements, [32, 4, 2]."""
    registers = torch.zeros(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            place = offset(first, k, 8 * matrix + lane // 4) // 2 + 2 * (lane % 4)
            registers[lane, matrix] = memory[place : place + 2]
    return registers


def test_mma_multiplies_what_ldmatrix_loads() -> None:
    """A 16 x 16 product over 64 elements, by the fragments of m16n8k16 as the PTX manual draws them."""
    g = torch.Generator().manual_seed(0)
    rows, words = (torch.randint(-4, 5, (128, 64), generator=g).float() for _ in range(2))
    first_row, first_word = 32, 80
    row_memory, word_memory = swizzled_tile(rows), swizzled_tile(words)
    sums = torch.zeros(16, 16)
    for k in range(4):
        a = load_matrices(row_memory, emulated.library().row_fragment_offset, first_row, k)
        b = load_matrices(word_memory, emulated.library().word_fragment_offset, first_word, k)
        left, right = torch.zeros(16, 16), torch.zeros(2, 16, 8)
        for lane in range(32):
            g_, q = lane // 4, lane % 4 * 2
            for register in range(4):
                row, depth = g_ + register % 2 * 8, q + register // 2 * 8
                left[row, depth : depth + 2] = a[lane, register]
                half, depth = register // 2, q + register % 2 * 8
                right[half, depth : depth + 2, g_] = b[lane, register]
        sums += torch.cat([left @ right[0], left @ right[1]], 1)
    assert torch.equal(sums, rows[first_row : first_row + 16] @ words[first_word : first_word + 16].T)


def test_accumulators_cover_a_tile_once() -> None:
    """m64n256k16 (PTX ISA, figure of the accumulator fragment): a warp has 16 rows, a lane two of them."""
    found = {}
    for lane in range(32):
        for group in range(8):
            for half in range(2):
                for i in range(8):
                    place = emulated.library().accumulator_place(group, half, i)
                    row, column = lane // 4 + 8 * half, 32 * group + i // 2 * 8 + lane % 4 * 2 + i % 2
                    assert (row, column) not in found
                    found[row, column] = lane, place
    assert len(found) == 16 * 256
    for (row, column), (lane, place) in found.items():  # register r of a lane, as the manual numbers them
        assert place == column // 8 * 4 + row // 8 * 2 + column % 2 and lane == row % 8 * 4 + column % 8 // 2


def units(row_blocks: int, parts: int, word_tiles: int, group: int) -> list[tuple[int, int, int, int]]:
    count = emulated.library().schedule_units(row_blocks, parts, word_tiles, group, None)
    flat = emulated.longs([0] * (4 * count))
    emulated.library().schedule_units(row_blocks, parts, word_tiles, group, flat)
    return [tuple(flat[4 * i : 4 * i + 4]) for i in range(count)]


def test_every_tile_is_done_once_and_by_the_part_that_says_so() -> None:
    draw = random.Random(0)
    for _ in range(300):
        word_tiles = draw.randint(1, 70)
        row_blocks, parts, group = draw.randint(1, 40), draw.randint(1, word_tiles), draw.randint(1, 20)
        seen = []
        for row_block, part, first, end in units(row_blocks, parts, word_tiles, group):
            assert first == part * word_tiles // parts and end == (part + 1) * word_tiles // parts and first < end
            seen += [(row_block, tile) for tile in range(first, end)]
        assert len(seen) == len(set(seen)) == row_blocks * word_tiles


def test_units_at_work_together_share_their_rows() -> None:
    """Any run of consecutive units as long as a group spans at most two groups of row blocks."""
    order = [unit[0] // 16 for unit in units(100, 4, 64, 16)]
    assert order == sorted(order)


@pytest.mark.parametrize("major", [0, 8, 9])
@pytest.mark.parametrize("rows", [1, 256, 375, 4096, 65536])
def test_the_plan_fills_the_device(major: int, rows: int) -> None:
    """Parts are few enough to have a tile each, and enough that a large codebook keeps most processors busy."""
    for entries in (1, 1024, 16384):
        tiles = -(-entries // 256)
        parts = emulated.library().screen_parts(132, major, rows, entries)
        assert min(4, tiles) <= parts <= min(tiles, 64)
    blocks, workers = (-(-rows // 256), 66) if major == 9 else (-(-rows // 128), 132)
    waves = -(-blocks * parts // workers)
    steps = waves * -(-64 // parts)
    assert steps * workers <= max(64 * blocks * 1.5, 2 * workers)
