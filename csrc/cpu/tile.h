// SPDX-License-Identifier: BSD-3-Clause
// Tiles of tensors in scratch memory: allocation, loads, stores, transposition.
#pragma once

#include <cstdint>
#include <new>

#include "common/math.h"
#include "common/params.h"
#include "common/window.h"
#include "cpu/convert.h"
#include "cpu/gemm.h"

namespace fa::cpu::FA_CPU_ISA {

inline constexpr int kCacheLine = 64;

// Columns of a tile: padded with zeros to whole blocks.
template <typename Real>
FA_CPU_INLINE int padded(int columns) {
  return round_up(columns, kBlockColumns<Real>);
}

// Scratch memory that holds a tile. Rows start an odd number of cache lines apart, so that a column
// of blocks spreads over all sets of the cache.
template <typename Real>
class TileBuffer {
 public:
  TileBuffer(int64_t rows, int columns)
      : ld_((ceil_div(padded<Real>(columns), kPerLine) | 1) * kPerLine),
        data_(static_cast<Real*>(::operator new(rows * ld_ * sizeof(Real), kAlignment))) {}
  ~TileBuffer() { ::operator delete(data_, kAlignment); }
  TileBuffer(const TileBuffer&) = delete;
  TileBuffer& operator=(const TileBuffer&) = delete;

  Tile<Real> tile(int64_t first_row = 0) const { return {data_ + first_row * ld_, ld_}; }

 private:
  static constexpr std::align_val_t kAlignment{kCacheLine};
  static constexpr int kPerLine = kCacheLine / sizeof(Real);

  int64_t ld_;
  Real* data_;
};

// The two sequences of a batch entry, and which keys of one the queries of the other see.
struct SequencePair {
  template <typename Params>
  SequencePair(const Params& params, int batch)
      : queries(params.queries.at(batch, params.shape.seqlen_q)),
        keys(params.keys.at(batch, params.shape.seqlen_k)),
        window(params.rules, params.window.over(queries.length, keys.length), batch) {}

  Sequence queries;
  Sequence keys;
  PrefixWindow window;
};

// Where a tile lies in a tensor.
struct Rows {
  int batch;
  int head;
  Sequence sequence;
  Range range;  // within the sequence

  int first() const { return sequence.begin + range.begin; }
};

// tile (rows, padded head_dim) = factor * tensor rows, zero beyond head_dim.
template <typename Element, typename Real>
void load_rows(const TensorView& tensor, const Rows& rows, int head_dim, Real factor,
               Tile<Real> tile) {
  const int whole = head_dim / kLanes<Real> * kLanes<Real>;
  for (int row = 0; row < rows.range.size(); ++row) {
    const Element* source = tensor.row<Element>(rows.batch, rows.first() + row, rows.head);
    Real* target = tile.row(row);
    for (int column = 0; column < whole; column += kLanes<Real>) {
      store(target + column, load_elements(source + column) * factor);
    }
    int column = whole;
    if (column < head_dim) {
      Element last[kLanes<Real>] = {};
      __builtin_memcpy(last, source + column, (head_dim - column) * sizeof(Element));
      store(target + column, load_elements(last) * factor);
      column += kLanes<Real>;
    }
    for (; column < padded<Real>(head_dim); column += kLanes<Real>) {
      store(target + column, Vec<Real>{});
    }
  }
}

// Tensor rows = factor * tile (rows, head_dim), where factor(row) is the row's.
template <typename Element, typename Real, typename Factor>
void store_rows(Tile<Real> tile, const Rows& rows, int head_dim, const Factor& factor,
                const TensorView& tensor) {
  const int whole = head_dim / kLanes<Real> * kLanes<Real>;
  for (int row = 0; row < rows.range.size(); ++row) {
    const Real* source = tile.row(row);
    Element* target = tensor.row<Element>(rows.batch, rows.first() + row, rows.head);
    const Real row_factor = factor(row);
    for (int column = 0; column < whole; column += kLanes<Real>) {
      store_elements(target + column, load(source + column) * row_factor);
    }
    if (whole < head_dim) {
      Element last[kLanes<Real>];
      store_elements(last, load(source + whole) * row_factor);
      __builtin_memcpy(target + whole, last, (head_dim - whole) * sizeof(Element));
    }
  }
}

// target (columns, padded rows) = source (rows, columns) transposed, zero beyond the rows.
template <typename Real>
void transpose(Tile<Real> source, int rows, int columns, Tile<Real> target) {
  constexpr int kStep = kBlockColumns<Real>;
  for (int first = 0; first < rows; first += kStep) {
    const int present = min(kStep, rows - first);
    for (int column = 0; column < columns; ++column) {
      Real* line = target.row(column) + first;
      for (int row = 0; row < present; ++row) {
        line[row] = source.row(first + row)[column];
      }
      for (int row = present; row < kStep; ++row) {
        line[row] = 0;
      }
    }
  }
}

template <typename Real>
void fill_rows(Tile<Real> tile, int64_t rows, int columns, Real value) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int column = 0; column < padded<Real>(columns); column += kLanes<Real>) {
      store(tile.row(row) + column, broadcast(value));
    }
  }
}

}  // namespace fa::cpu::FA_CPU_ISA
