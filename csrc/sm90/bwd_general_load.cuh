// SPDX-License-Identifier: BSD-3-Clause
// The warps of the general backward kernel that do not compute, but for the one that loads keys,
// which is as in the plain kernel.
#pragma once

#include "ptx/reduce.cuh"
#include "sm90/bwd_general_traits.h"
#include "sm90/bwd_load.cuh"

namespace fa::sm90 {

// As of the plain kernel, and a bias in boxes of a tile's queries, if it comes by TMA. Wide rows
// have no maps of dk and dv.
struct GeneralBwdTensorMaps : BwdTensorMaps {
  CUtensorMap bias;
  bool loads_bias;
};

// By one thread: copies the bias of a tile of queries and a tile of keys.
template <typename Tile>
FA_DEVICE void copy_bias(Tile& s_bias, uint64_t& s_full, const CUtensorMap& map,
                         const ScoreTensor& bias, int batch, int head, int first_query,
                         int first_key) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_load(s_bias.elements + panel * Tile::kRows * Tile::kPanelCols, &map,
                  {first_key + panel * Tile::kPanelCols, first_query,
                   bias.head_stride == 0 ? 0 : head, bias.batch_stride == 0 ? 0 : batch},
                  s_full);
  }
}

// Where a tile of queries lies that was told of: found again whenever it is asked for.
template <typename Traits>
class PlaceOfTold {
 public:
  FA_DEVICE PlaceOfTold(const BwdParams& params, const typename Traits::Work& s_work,
                        const ToldTile& told)
      : params_(params), s_work_(s_work), told_(told) {}

  FA_DEVICE int index() const { return told_.index; }
  FA_DEVICE int head() const { return told_.head; }
  FA_DEVICE int tile() const { return told_.tile(); }
  FA_DEVICE bool is_mixed() const { return told_.is_mixed(); }
  FA_DEVICE int first_query() const { return tile() * Traits::kTileM; }
  FA_DEVICE int row() const { return s_work_.queries.begin + first_query(); }
  FA_DEVICE int rows() const {
    return rows_to_keep(params_.queries, s_work_.queries, first_query(), Traits::kTileM);
  }

 private:
  const BwdParams& params_;
  const typename Traits::Work& s_work_;
  const ToldTile& told_;
};

// The same in registers, found at once.
class HeldPlace {
 public:
  template <typename Place>
  explicit FA_DEVICE HeldPlace(const Place& place)
      : index_(place.index()),
        head_(place.head()),
        tile_(place.tile()),
        is_mixed_(place.is_mixed()),
        first_query_(place.first_query()),
        row_(place.row()),
        rows_(place.rows()) {}

  FA_DEVICE int index() const { return index_; }
  FA_DEVICE int head() const { return head_; }
  FA_DEVICE int tile() const { return tile_; }
  FA_DEVICE bool is_mixed() const { return is_mixed_; }
  FA_DEVICE int first_query() const { return first_query_; }
  FA_DEVICE int row() const { return row_; }
  FA_DEVICE int rows() const { return rows_; }

 private:
  int index_;
  int head_;
  int tile_;
  bool is_mixed_;
  int first_query_;
  int row_;
  int rows_;
};

// By one warp: loads a tile of queries, with dout, statistics and bias, and the bits of a mixed
// one, unless a bias lies in their place.
template <typename Traits, typename Place>
FA_DEVICE void load_tile_at(const BwdParams& params, const GeneralBwdTensorMaps& maps,
                            typename Traits::SharedMemory& s, const typename Traits::Work& s_work,
                            const device::RingPosition<kBwdStages>& at, Landing& landing,
                            const Place& place) {
  constexpr int kTileM = Traits::kTileM;
  constexpr int kBytesOfBits = kTileM * Traits::kTileN / 8;
  const auto copy = [&](auto& s_tile, uint64_t& s_barrier, const CUtensorMap& map) {
    copy_rows(s_tile, 0, s_barrier, map, place.row(), place.head(),
              s_work.batch_of_queries(params));
  };
  auto& s_q = s.q[at.stage()];
  auto& s_dout = s.dout[at.stage()];
  auto& s_bias = s.bias_tile(at.stage());
  auto& s_statistics = s.statistics[at.stage()];
  const bool has_room = Traits::kHasRoomForBits || params.rules.bias.data == nullptr;
  const bool loads_bits = place.is_mixed() && params.pair_bits.words != nullptr && has_room;
  const int bytes_of_bits = loads_bits ? kBytesOfBits : 0;
  const int bytes_of_bias = maps.loads_bias ? sizeof(s_bias) : 0;
  fill_stage(
      s.q_ring, at, sizeof(s_q) + sizeof(s_statistics) + bytes_of_bits + bytes_of_bias,
      place.rows() < kTileM, landing,
      [&](uint64_t& s_barrier) {
        copy(s_q, s_barrier, maps.q);
        ptx::bulk_load(&s_statistics, params.workspace.lse_log2(place.index()),
                       sizeof(s_statistics), s_barrier);
        if (maps.loads_bias) {
          copy_bias(s_bias, s_barrier, maps.bias, params.rules.bias, s_work.tile.batch,
                    place.head(), place.first_query(), s_work.first_key);
        }
        if (loads_bits) {
          ptx::bulk_load(s.bits_of(at.stage()),
                         params.pair_bits.tile(s_work.tile.batch, place.head(), place.tile(),
                                               s_work.key_tile()),
                         kBytesOfBits, s_barrier);
        }
      },
      [&](int lane) { clear_rows<ptx::kWarpSize>(s_q, place.rows(), lane); });
  fill_stage(
      s.dout_ring, at, sizeof(s_dout), place.rows() < kTileM, landing,
      [&](uint64_t& s_barrier) { copy(s_dout, s_barrier, maps.dout); },
      [&](int lane) { clear_rows<ptx::kWarpSize>(s_dout, place.rows(), lane); });
}

// Loads the tiles of queries that see some of the keys, and tells of each with its queries, by one
// warp. Before it tells whether an item has any.
template <typename Traits>
FA_DEVICE void load_visible_queries(const BwdParams& params, const GeneralBwdTensorMaps& maps,
                                    typename Traits::SharedMemory& s) {
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<kBwdStages> at;
  device::RingPosition<1> may_take_at;
  Landing landing = {s.landings[1]};
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    auto& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    VisibleQueryTiles<Traits::kTileM, Traits::kTileN> tiles(params, s_work);
    bool may_take = false;
    const auto let_take = [&](bool is_time) {
      if (is_time && !may_take) {
        may_take = true;
        if (ptx::lane_index() == 0) {
          may_take_at.fill(s.may_take);
        }
      }
    };
    let_take(tiles.done());
    if (ptx::lane_index() == 0) {
      s_work.has_visible_tiles = !tiles.done();
      work_at.fill(s.visible_ring);
    }
    for (; !tiles.done(); at.advance()) {
      const QueryTile tile = tiles.current();
      const bool is_mixed = tiles.is_mixed();
      tiles.advance();
      let_take(tiles.has_at_most(kQueryTilesToTakeAhead - 1));
      const auto index = params.workspace.index(tile.head, s_work.first_query_tile + tile.tile);
      const ToldTile told = ToldTile::of(static_cast<int>(index), tile, is_mixed, tiles.done());
      const auto tell = [&] {
        s.wait_for_room(at);
        if (ptx::lane_index() == 0) {
          s.told[at.stage()] = told;
        }
        __syncwarp();
      };
      using Place = PlaceOfTold<Traits>;
      if constexpr (Traits::kHoldsPlace) {  // so that loads begin as soon as there is room
        const HeldPlace place(Place(params, s_work, told));
        tell();
        load_tile_at<Traits>(params, maps, s, s_work, at, landing, place);
      } else {
        tell();
        load_tile_at<Traits>(params, maps, s, s_work, at, landing,
                             Place(params, s_work, s.told[at.stage()]));
      }
    }
    __syncwarp();
    work_at.release(s.work_ring);
  }
}

// As keep_turns(), of tiles of queries that see some of the keys.
template <typename Traits>
FA_DEVICE void keep_turns_of_visible(const BwdParams& params, typename Traits::SharedMemory& s,
                                     bool begins) {
  device::RingPosition<kWorkStages> work_at;
  device::RingPosition<kBwdStages> at;
  for (;; work_at.advance()) {
    work_at.wait(s.work_ring);
    const auto& s_work = s.work[work_at.stage()];
    if (s_work.is_end()) {
      break;
    }
    VisibleQueryTiles<Traits::kTileM, Traits::kTileN> tiles(params, s_work);
    for (; !tiles.done(); tiles.advance(), at.advance()) {
      const QueryTile tile = tiles.current();
      const int turn = begins ? s_work.turn(params.tile_map, tile) : 0;
      if (ptx::lane_index() == 0) {
        int* g_turn = params.workspace.turn(
            params.workspace.index(tile.head, s_work.first_query_tile + tile.tile));
        if (begins) {
          at.wait_empty(s.added_ring);
          while (ptx::load_acquire(g_turn) < turn) {
          }
          at.fill(s.turn_ring);
        } else {
          at.wait(s.added_ring);
          ptx::add_release(g_turn, 1);
          at.release(s.added_ring);
        }
      }
      __syncwarp();
    }
    __syncwarp();
    work_at.release(s.work_ring);
  }
}

}  // namespace fa::sm90
