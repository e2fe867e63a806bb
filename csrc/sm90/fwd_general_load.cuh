// SPDX-License-Identifier: BSD-3-Clause
// The four warps of the general forward kernel that do not compute.
#pragma once

#include "sm90/fwd_general_traits.h"
#include "sm90/fwd_load.cuh"

namespace fa::sm90 {

// As of the plain kernel, and a bias in boxes of a warpgroup's rows, if it comes by TMA.
struct GeneralFwdTensorMaps : FwdTensorMaps {
  CUtensorMap bias;
  bool loads_bias;
};

// Takes the work and loads queries.
template <typename Traits>
FA_DEVICE void load_general_queries(const FwdParams& params, const GeneralFwdTensorMaps& maps,
                                    const Schedule& schedule, typename Traits::SharedMemory& s) {
  device::RingPosition<Traits::kQStages> q_at;
  give_out_work<GeneralFwdWork, Traits>(params, schedule, s, [&](const GeneralFwdWork& work) {
    if (!work.key_tiles.empty()) {
#pragma unroll 1
      for (int warpgroup = 0; warpgroup < Traits::kMathWarpgroups; ++warpgroup) {
        const int row = warpgroup * device::kWarpgroupRows;
        load_rows<device::kWarpgroupRows>(s.q, row, s.q_ring[warpgroup], q_at, maps.q,
                                          work.queries.begin + work.first_query + row,
                                          work.tile.head, work.batch_of_queries(params));
      }
      q_at.advance();
    }
  });
}

// Loads the keys, values and bias of visible tiles, and tells of each with its keys. Where an item
// has none, a stage without keys says so.
template <typename Traits>
FA_DEVICE void load_visible_tiles(const FwdParams& params, const GeneralFwdTensorMaps& maps,
                                  typename Traits::SharedMemory& s) {
  constexpr int kTileN = Traits::kTileN;
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<Traits::kKvStages> k_at;
  device::RingPosition<Traits::kKvStages> v_at;
  device::RingPosition<1> bias_at;
  device::RingPosition<1> may_take_at;
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const GeneralFwdWork& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    auto tiles = s_work.visible_tiles<kTileN>(params, Tiles::kVisible);
    tiles.advance();
    const int head = ptx::uniform(s_work.tile.head);
    const int head_kv = head / params.shape.group_size();
    const int batch = ptx::uniform(s_work.tile.batch);
    const int batch_of_keys = ptx::uniform(s_work.batch_of_keys(params));
    const int first_key = ptx::uniform(s_work.keys.begin);
    const int first_query = ptx::uniform(s_work.first_query);
    bool may_take = false;
    const auto let_take = [&](bool is_time) {
      if (is_time && !may_take) {
        may_take = true;
        if (ptx::lane_index() == 0) {
          may_take_at.fill(s.may_take);
        }
      }
    };
    if (tiles.done()) {
      let_take(true);
      k_at.wait_empty(s.k_ring);
      if (ptx::lane_index() == 0) {
        s.key_tiles[k_at.stage()] = KeyTile::none();
        k_at.fill(s.k_ring);
      }
      __syncwarp();
      k_at.advance();
    }
    const auto load_values = [&](int tile) {
      load_rows<kTileN>(s.v, 0, s.v_ring, v_at, maps.v, first_key + tile * kTileN, head_kv,
                        batch_of_keys);
      v_at.advance();
    };
    for (int previous = -1; !tiles.done();) {
      const int tile = tiles.tile();
      const bool is_mixed = tiles.is_mixed();
      tiles.advance();
      let_take(tiles.has_at_most(kTilesToTakeAhead - 1));
      const KeyTile key_tile = KeyTile::of(tile, is_mixed, tiles.done());
      k_at.wait_empty(s.k_ring);
      if (ptx::lane_index() == 0) {
        s.key_tiles[k_at.stage()] = key_tile;
      }
      load_rows<kTileN>(s.k, 0, s.k_ring, k_at, maps.k, first_key + tile * kTileN, head_kv,
                        batch_of_keys);
      k_at.advance();
      if (previous >= 0) {
        load_values(previous);
      }
      if (maps.loads_bias) {
#pragma unroll
        for (int warpgroup = 0; warpgroup < Traits::kMathWarpgroups; ++warpgroup) {
          bias_at.wait_empty(s.bias_ring[warpgroup]);
          if (ptx::lane_index() == 0) {
            auto& s_bias = s.bias[warpgroup];
            uint64_t& s_full = bias_at.expect(s.bias_ring[warpgroup], sizeof(s_bias));
            using Tile = typename Traits::Bias;
#pragma unroll
            for (int panel = 0; panel < Tile::kPanels; ++panel) {
              ptx::tma_load(s_bias.elements + panel * Tile::kRows * Tile::kPanelCols, &maps.bias,
                            {tile * kTileN + panel * Tile::kPanelCols,
                             first_query + warpgroup * device::kWarpgroupRows,
                             params.rules.bias.head_stride == 0 ? 0 : head,
                             params.rules.bias.batch_stride == 0 ? 0 : batch},
                            s_full);
            }
          }
          __syncwarp();
        }
        bias_at.advance();
      }
      if (tiles.done()) {
        load_values(tile);
      }
      previous = tile;
    }
    __syncwarp();
    work_at.release(s.work_ring);
  }
}

// Which pairs of tiles of keys are seen by the rows of a warpgroup, as a warp finds out.
template <typename Traits>
class PairFinder {
 public:
  static constexpr int kTileN = Traits::kTileN;
  using Seen = SeenPairsOfWarpgroup<kTileN>;
  using Documents = DocumentsOfWarpgroup<kTileN>;

  FA_DEVICE PairFinder(const FwdParams& params, int warpgroup)
      : params_(params),
        warpgroup_(warpgroup),
        rules_((PairBits::is_of(params.rules.masks[0]) ? kMask : 0) |
               (needs_pairs(params.rules) ? kMasks : 0) |
               (params.rules.document_ids != nullptr ? kDocuments : 0)) {}

  // work(): read and computed again rather than kept, for want of registers.
  template <typename Work>
  FA_DEVICE void find(Seen& seen, Work&& work, int tile) const {
    const GeneralFwdWork& s_work = work();
    const int first_query = s_work.first_query + row();
    const int first_key = tile * kTileN;
    if (!has(kMasks) &&
        s_work.prefix_window(params_).all({first_query, first_query + device::kWarpgroupRows},
                                          {first_key, first_key + kTileN})) {
      seen.see_all();
      return;
    }
    seen.find([&](int half) {
      const GeneralFwdWork& s_again = work();
      SeenPairsOfWarp<kTileN> found(
          s_again.prefix_window(params_), s_again.first_query + row() + half * ptx::kWarpSize,
          s_again.queries.length, static_cast<int>(ptx::opaque(first_key)));
      found.keep_masks(params_.rules, s_again.tile.batch, s_again.tile.head);
      return found;
    });
  }

  // Of all pairs.
  FA_DEVICE bool has_mask() const { return has(kMask); }
  FA_DEVICE void load_mask(Seen& of_mask, const GeneralFwdWork& s_work, int tile) const {
    const WorkTile& item = s_work.tile;
    if (params_.pair_bits.words != nullptr) {
      of_mask.load(params_.pair_bits.tile(item.batch, item.head, item.tile, tile) +
                   row() * SeenPairs<kTileN>::kWords);
    } else if (has_mask()) {
      const int first_query = s_work.first_query + row();
      const int first_key = tile * kTileN;
      const KeepMask& mask = params_.rules.masks[0];
      of_mask.load(
          mask,
          mask.of_head<const uint8_t>(item.batch, item.head) + mask.offset(first_query, first_key),
          params_.shape.seqlen_q - first_query, params_.shape.seqlen_k - first_key);
    }
  }

  FA_DEVICE bool has_documents() const { return has(kDocuments); }
  FA_DEVICE void load_queries(Documents& documents, const GeneralFwdWork& s_work) const {
    if (has_documents()) {
      documents.load_queries(ids(s_work), s_work.first_query + row(), s_work.queries.length);
    }
  }
  FA_DEVICE void load_keys(Documents& documents, const GeneralFwdWork& s_work, int tile) const {
    if (has_documents()) {
      documents.load_keys(ids(s_work), tile * kTileN, s_work.keys.length);
    }
  }

 private:
  FA_DEVICE int row() const {
    return static_cast<int>(ptx::opaque(warpgroup_)) * device::kWarpgroupRows;
  }
  enum Rule : uint32_t { kMask = 1, kMasks = 2, kDocuments = 4 };
  FA_DEVICE bool has(Rule rule) const { return (ptx::opaque(rules_) & rule) != 0; }
  FA_DEVICE const int32_t* ids(const GeneralFwdWork& s_work) const {
    return params_.rules.document_ids + s_work.tile.batch * params_.rules.document_stride;
  }

  const FwdParams& params_;
  int warpgroup_;
  uint32_t rules_;  // in one register: a flag for each would be kept where there is no room
};

// Finds out which pairs of the mixed tiles are seen, of the rows of one warpgroup. It walks the
// tiles by itself, so that nothing but the place for what it finds holds it up. The bits of a mask
// and the documents of keys are on their way while those of the tile before it are used.
template <typename Traits>
FA_DEVICE void find_seen_pairs(const FwdParams& params, typename Traits::SharedMemory& s,
                               int warpgroup) {
  using Finder = PairFinder<Traits>;
  const Finder finder(params, warpgroup);
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<1> at;
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const GeneralFwdWork& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    auto tiles = s_work.visible_tiles<Traits::kTileN>(params, Tiles::kMixed);
    typename Finder::Seen of_mask;
    typename Finder::Documents documents;
    finder.load_queries(documents, s_work);
#pragma unroll 1
    for (int tile = -1;;) {
      typename Finder::Seen seen;
      if (tile >= 0) {
        const auto work = [&]() -> const GeneralFwdWork& {
          return s.work[ptx::opaque(work_at.stage())];
        };
        finder.find(seen, work, tile);
        if (finder.has_mask()) {
          seen.keep(of_mask);
        }
        if (finder.has_documents()) {
          seen.keep(documents);
        }
      }
      tiles.advance();
      if (!tiles.done()) {
        finder.load_mask(of_mask, s_work, tiles.tile());
        finder.load_keys(documents, s_work, tiles.tile());
      }
      if (tile >= 0) {
        at.wait_empty(s.seen_ring[warpgroup]);
        seen.store(s.seen[warpgroup]);
        at.fill(s.seen_ring[warpgroup]);
        at.advance();
      }
      if (tiles.done()) {
        break;
      }
      tile = tiles.tile();
    }
    __syncwarp();
    work_at.release(s.work_ring);
  }
}

}  // namespace fa::sm90
