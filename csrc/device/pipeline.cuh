// SPDX-License-Identifier: BSD-3-Clause
// Tiles that pass from a producer to consumers through a ring of stages in shared memory. Each
// stage has two mbarriers: `full` completes when its tile has arrived, `empty` when all consumers
// have released it. Both sides walk the ring alike, each with a position of its own.
#pragma once

#include "ptx/mbarrier.cuh"

namespace fa::device {

template <int kStages>
struct Ring {
  uint64_t full[kStages];
  uint64_t empty[kStages];

  // By one thread.
  FA_DEVICE void init(int releases, int fills = 1) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full[stage], fills);
      ptx::mbarrier_init(empty[stage], releases);
    }
  }
};

template <int kStages>
class RingPosition {
 public:
  FA_DEVICE bool is_first() const { return passed_ == 0; }
  FA_DEVICE int stage() const { return stage(passed_); }
  FA_DEVICE int previous_stage() const { return stage(passed_ - 1); }
  FA_DEVICE void advance() { ++passed_; }

  // The same in a ring of another length, where both advance together.
  template <int kOtherStages>
  FA_DEVICE RingPosition<kOtherStages> in_ring_of() const {
    RingPosition<kOtherStages> other;
    other.passed_ = passed_;
    return other;
  }

  // Producer: until the stage is free, which it is in the first round.
  FA_DEVICE void wait_empty(Ring<kStages>& s_ring) const {
    ptx::mbarrier_wait(s_ring.empty[stage()], parity(passed_) ^ 1);
  }

  // Producer, by one thread: the barrier to copy so many bytes to.
  FA_DEVICE uint64_t& expect(Ring<kStages>& s_ring, int bytes) const {
    ptx::mbarrier_arrive_expecting(s_ring.full[stage()], bytes);
    return s_ring.full[stage()];
  }

  // Producer, by each thread that has written to the stage, or to the one before it.
  FA_DEVICE void fill(Ring<kStages>& s_ring) const { ptx::mbarrier_arrive(s_ring.full[stage()]); }
  FA_DEVICE void fill_previous(Ring<kStages>& s_ring) const {
    ptx::mbarrier_arrive(s_ring.full[previous_stage()]);
  }

  // Consumer: until the tile has arrived, or the one before it, or the next one. What is before the
  // first tile counts as arrived.
  FA_DEVICE void wait(Ring<kStages>& s_ring) const { wait(s_ring, passed_); }
  FA_DEVICE void wait_previous(Ring<kStages>& s_ring) const { wait(s_ring, passed_ - 1); }
  FA_DEVICE void wait_next(Ring<kStages>& s_ring) const { wait(s_ring, passed_ + 1); }

  // Consumer: the same for tiles of two rings.
  template <int kOtherStages>
  FA_DEVICE void wait_both(Ring<kStages>& s_ring, const RingPosition<kOtherStages>& other,
                           Ring<kOtherStages>& s_other) const {
    ptx::mbarrier_wait_both(s_ring.full[stage()], parity(passed_), s_other.full[other.stage()],
                            other.parity(other.passed_));
  }

  // Consumer, by all lanes of each warp: this stage, or the one before it.
  FA_DEVICE void release(Ring<kStages>& s_ring) const { release(s_ring, passed_); }
  FA_DEVICE void release_previous(Ring<kStages>& s_ring) const { release(s_ring, passed_ - 1); }

 private:
  template <int>
  friend class RingPosition;

  FA_DEVICE static void wait(Ring<kStages>& s_ring, uint32_t passed) {
    ptx::mbarrier_wait(s_ring.full[stage(passed)], parity(passed));
  }
  FA_DEVICE static void release(Ring<kStages>& s_ring, uint32_t passed) {
    if (ptx::lane_index() == 0) {
      ptx::mbarrier_arrive(s_ring.empty[stage(passed)]);
    }
  }
  FA_DEVICE static int stage(uint32_t passed) { return static_cast<int>(passed % kStages); }
  FA_DEVICE static uint32_t parity(uint32_t passed) { return passed / kStages % 2; }

  uint32_t passed_ = 0;  // stages; wraps around where the number of stages is a power of two
  static_assert((kStages & (kStages - 1)) == 0);
};

}  // namespace fa::device
