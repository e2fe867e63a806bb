// SPDX-License-Identifier: BSD-3-Clause
// Sequences lie where cu_seqlens and seqused say, and their tiles are numbered without overlap.
#include "common/seqlen.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/left_rows.h"
#include "common/math.h"
#include "tests/support/check.h"

namespace {

using fa::Sequence;
using fa::Sequences;

void expect_at(const Sequences& sequences, int batch, Sequence expected) {
  const Sequence sequence = sequences.at(batch, 100);
  FA_EXPECT_EQ(sequence.begin, expected.begin, "batch", batch);
  FA_EXPECT_EQ(sequence.length, expected.length, "batch", batch);
}

void check_places() {
  const int32_t cu_seqlens[] = {3, 10, 10, 50};
  const int32_t seqused[] = {5, 0, 40};
  const int packed_length[] = {7, 0, 40};
  for (int batch = 0; batch < 3; ++batch) {
    expect_at({}, batch, {0, 100});
    expect_at({.seqused = seqused}, batch, {0, seqused[batch]});
    expect_at({.cu_seqlens = cu_seqlens}, batch, {cu_seqlens[batch], packed_length[batch]});
    expect_at({cu_seqlens, seqused}, batch, {cu_seqlens[batch], seqused[batch]});
  }
}

// The tiles of each sequence end before those of the next begin, and the last ends in time.
void check_tiles(const Sequences& sequences, int batch, int64_t total_rows, int seqlen,
                 int tile_rows) {
  int64_t end = 0;
  for (int b = 0; b < batch; ++b) {
    const int64_t first = sequences.first_tile(b, seqlen, tile_rows);
    FA_EXPECT(first >= end, "batch", b, "tile_rows", tile_rows, "seqlen", seqlen);
    end = first + fa::ceil_div<int64_t>(sequences.at(b, seqlen).length, tile_rows);
  }
  const int64_t count = sequences.count_tiles(batch, total_rows, seqlen, tile_rows);
  FA_EXPECT(end <= count, "batch", batch, "tile_rows", tile_rows, "seqlen", seqlen);
  const int64_t needed = batch * fa::ceil_div<int64_t>(seqlen, tile_rows);
  FA_EXPECT(count <= std::max(needed, total_rows / tile_rows + batch), "batch", batch);
}

// The gaps and the sequences share out all rows.
void check_rows_left(const Sequences& sequences, int batch, int rows) {
  const bool packed = sequences.cu_seqlens != nullptr;
  for (int entry = 0; entry < (packed ? 1 : batch); ++entry) {
    std::vector<int> owners(rows);
    const auto own = [&](int begin, int end) {
      for (int row = begin; row < end; ++row) {
        owners.at(row) += 1;
      }
    };
    for (int b = packed ? 0 : entry; b < (packed ? batch : entry + 1); ++b) {
      const Sequence sequence = sequences.at(b, rows);
      own(sequence.begin, sequence.begin + sequence.length);
    }
    for (int gap = packed ? 0 : entry; gap < (packed ? batch + 1 : entry + 1); ++gap) {
      const fa::Range left = fa::rows_left(sequences, gap, batch, rows);
      own(left.begin, left.end);
    }
    for (int row = 0; row < rows; ++row) {
      FA_EXPECT_EQ(owners[row], 1, "row", row, "of", rows, "entry", entry, "packed", packed);
    }
  }
  if (!packed) {
    FA_EXPECT(fa::rows_left(sequences, batch, batch, rows).empty(), "batch", batch);
  }
}

// Every tile of every sequence is found by its number, and a number of none leads past an end.
void check_numbers(const Sequences& sequences, int batch, int64_t total_rows, int seqlen,
                   int tile_rows) {
  const int64_t count = sequences.count_tiles(batch, total_rows, seqlen, tile_rows);
  std::vector<Sequences::NumberedTile> tiles(batch == 0 ? 0 : count, {-1, -1});
  for (int b = 0; b < batch; ++b) {
    const int64_t first = sequences.first_tile(b, seqlen, tile_rows);
    for (int tile = 0; tile * tile_rows < sequences.at(b, seqlen).length; ++tile) {
      tiles[first + tile] = {b, tile};
    }
  }
  for (int64_t number = 0; number < static_cast<int64_t>(tiles.size()); ++number) {
    const auto [b, tile] = sequences.tile_of_number(number, batch, seqlen, tile_rows);
    const auto [wanted_b, wanted_tile] = tiles[number];
    if (wanted_b >= 0) {
      FA_EXPECT(b == wanted_b && tile == wanted_tile, "number", number, "is", b, tile, "instead of",
                wanted_b, wanted_tile, "tile_rows", tile_rows);
    } else {
      FA_EXPECT(0 <= b && b < batch, "number", number, "is of sequence", b);
      FA_EXPECT(int64_t{tile} * tile_rows >= sequences.at(b, seqlen).length, "number", number, "is",
                b, tile, "though none has it", "tile_rows", tile_rows);
    }
  }
}

void check_random_tiles() {
  std::mt19937 random(0);
  const auto draw = [&random](int most) {
    return std::uniform_int_distribution<int>(0, most)(random);
  };
  for (int trial = 0; trial < 2000; ++trial) {
    const int batch = draw(6);
    const int tile_rows = 1 << draw(7);
    std::vector<int32_t> cu_seqlens = {draw(5)};
    int longest = 0;
    for (int b = 0; b < batch; ++b) {
      const int length = draw(3) == 0 ? 0 : draw(300);
      cu_seqlens.push_back(cu_seqlens.back() + length);
      longest = std::max(longest, length);
    }
    const int64_t total_rows = cu_seqlens.back() + draw(5);
    check_tiles({.cu_seqlens = cu_seqlens.data()}, batch, total_rows, longest, tile_rows);
    check_tiles({}, batch, longest, longest, tile_rows);
    check_numbers({.cu_seqlens = cu_seqlens.data()}, batch, total_rows, longest, tile_rows);
    check_numbers({}, batch, longest, longest, tile_rows);
    std::vector<int32_t> seqused;
    for (int b = 0; b < batch; ++b) {
      seqused.push_back(draw(cu_seqlens[b + 1] - cu_seqlens[b]));
    }
    const int rows = static_cast<int>(total_rows);
    check_rows_left({.cu_seqlens = cu_seqlens.data()}, batch, rows);
    check_rows_left({cu_seqlens.data(), seqused.data()}, batch, rows);
    check_rows_left({.seqused = seqused.data()}, batch, longest);
    check_rows_left({}, batch, longest);
  }
}

void check_beyond_32_bits() {
  const int kBatch = 1 << 20;
  const int kSeqlen = 1 << 29;
  FA_EXPECT_EQ(Sequences{}.first_tile(kBatch, kSeqlen, 16), int64_t{1} << 45);
  FA_EXPECT_EQ(Sequences{}.count_tiles(kBatch, kSeqlen, kSeqlen, 16), int64_t{1} << 45);
  const int32_t most = std::numeric_limits<int32_t>::max();
  const int32_t cu_seqlens[] = {0, most};
  check_tiles({.cu_seqlens = cu_seqlens}, 1, most, most, 1);
}

}  // namespace

int main() {
  check_places();
  check_random_tiles();
  check_beyond_32_bits();
  return fa::test::report("common/test_seqlen");
}
