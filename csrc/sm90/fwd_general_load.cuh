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

// Finds out which pairs of the mixed tiles are seen, of the rows of one warpgroup. It walks the
// tiles by itself, so that nothing but the place for what it finds holds it up. The bits of a mask
// and the documents of keys are on their way while those of the tile before it are used.
template <typename Traits>
FA_DEVICE void find_seen_pairs(const FwdParams& params, typename Traits::SharedMemory& s,
                               int warpgroup) {
  constexpr int kTileN = Traits::kTileN;
  const int row = warpgroup * device::kWarpgroupRows;
  const ScoreRules& rules = params.rules;
  const KeepMask& mask = rules.masks[0];  // of all pairs, if any is
  const bool has_mask = PairBits::is_of(mask);
  const bool has_documents = rules.document_ids != nullptr;
  const bool has_masks = needs_pairs(rules);
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<1> at;
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const GeneralFwdWork& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    auto tiles = s_work.visible_tiles<kTileN>(params, Tiles::kMixed);
    SeenPairsOfWarpgroup<kTileN> of_mask;
    DocumentsOfWarpgroup<kTileN> documents;
    const auto g_ids = [&] {
      return rules.document_ids + s_work.tile.batch * rules.document_stride;
    };
    if (has_documents) {
      documents.load_queries(g_ids(), s_work.first_query + row, s_work.queries.length);
    }
#pragma unroll 1
    for (int tile = -1;;) {
      SeenPairsOfWarpgroup<kTileN> seen;
      if (tile >= 0) {
        const int first_query = s_work.first_query + row;
        const int first_key = tile * kTileN;
        if (has_masks ||
            !s_work.prefix_window(params).all({first_query, first_query + device::kWarpgroupRows},
                                              {first_key, first_key + kTileN})) {
          seen.find([&](int half) {
            // Read and computed again rather than kept, for want of registers.
            const GeneralFwdWork& s_again = s.work[ptx::opaque(work_at.stage())];
            SeenPairsOfWarp<kTileN> found(
                s_again.prefix_window(params), s_again.first_query + row + half * ptx::kWarpSize,
                s_again.queries.length, static_cast<int>(ptx::opaque(first_key)));
            found.keep_masks(rules, s_again.tile.batch, s_again.tile.head);
            return found;
          });
        } else {
          seen.see_all();
        }
        if (has_mask) {
          seen.keep(of_mask);
        }
        if (has_documents) {
          seen.keep(documents);
        }
      }
      tiles.advance();
      if (!tiles.done()) {
        const WorkTile& item = s_work.tile;
        if (params.pair_bits.words != nullptr) {
          of_mask.load(params.pair_bits.tile(item.batch, item.head, item.tile, tiles.tile()) +
                       row * SeenPairs<kTileN>::kWords);
        } else if (has_mask) {
          const int first_query = s_work.first_query + row;
          const int first_key = tiles.tile() * kTileN;
          of_mask.load(mask,
                       mask.of_head<const uint8_t>(item.batch, item.head) +
                           mask.offset(first_query, first_key),
                       params.shape.seqlen_q - first_query, params.shape.seqlen_k - first_key);
        }
        if (has_documents) {
          documents.load_keys(g_ids(), tiles.tile() * kTileN, s_work.keys.length);
        }
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
