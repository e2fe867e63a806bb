// SPDX-License-Identifier: BSD-3-Clause
// The parts of the backward pass's workspace fill its memory, aligned and without overlap.
#include "common/workspace.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tests/support/check.h"

namespace {

using fa::BwdWorkspace;

bool aligned(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

void check_parts(int64_t num_heads, int64_t tiles, int tile_m, int head_dim, bool deterministic) {
  const int64_t all_tiles = num_heads * tiles;
  const int64_t count = BwdWorkspace::floats(all_tiles, tile_m, head_dim, deterministic);
  std::vector<float> memory(static_cast<size_t>(count) + 4);
  float* begin = memory.data();
  while (!aligned(begin, 16)) {
    ++begin;
  }
  const BwdWorkspace workspace =
      BwdWorkspace::in(begin, num_heads, tiles, tile_m, head_dim, deterministic);

  std::vector<int> owners(static_cast<size_t>(count));
  const auto claim = [&](const void* part, int64_t size) {
    const int64_t first = static_cast<const float*>(part) - begin;
    FA_EXPECT(0 <= first && first + size <= count, "first", first, "size", size);
    for (int64_t i = std::max<int64_t>(first, 0); i < std::min(first + size, count); ++i) {
      ++owners[static_cast<size_t>(i)];
    }
  };
  FA_EXPECT_EQ(workspace.ticket() != nullptr, deterministic);
  if (deterministic) {
    FA_EXPECT(aligned(workspace.ticket(), sizeof(unsigned long long)));
    claim(workspace.ticket(), BwdWorkspace::kTicketInts);
  }
  for (int64_t head = 0; head < num_heads; ++head) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t index = workspace.index(head, tile);
      claim(workspace.dq_sum(index), int64_t{tile_m} * head_dim);
      claim(workspace.lse_log2(index), tile_m);
      claim(workspace.delta(index), tile_m);
      FA_EXPECT(aligned(workspace.dq_sum(index), 16), "index", index);
      FA_EXPECT(aligned(workspace.lse_log2(index), 16), "index", index);
      FA_EXPECT_EQ(workspace.delta(index), workspace.lse_log2(index) + tile_m);  // one copy
      FA_EXPECT_EQ(workspace.turn(index) != nullptr, deterministic);
      if (deterministic) {
        claim(workspace.turn(index), 1);
      }
    }
  }
  FA_EXPECT(std::all_of(owners.begin(), owners.end(), [](int n) { return n == 1; }), "heads",
            num_heads, "tiles", tiles, "tile_m", tile_m, "head_dim", head_dim);
}

void check_beyond_32_bits() {
  const int64_t tiles = int64_t{1} << 24;
  FA_EXPECT_EQ(BwdWorkspace::floats(128 * tiles, 64, 512, true),
               128 * tiles * 64 * 514 + 128 * tiles + BwdWorkspace::kTicketInts);
}

}  // namespace

int main() {
  for (const bool deterministic : {false, true}) {
    for (const int64_t num_heads : {0, 1, 3}) {
      for (const int64_t tiles : {0, 1, 4}) {
        check_parts(num_heads, tiles, 64, 128, deterministic);
        check_parts(num_heads, tiles, 16, 32, deterministic);
      }
    }
  }
  check_beyond_32_bits();
  return fa::test::report("common/test_workspace");
}
