// Loops over rows and over the vectors of a row, shared by the elementwise kernels.
//
// A kernel is one lambda that processes a vector; for_vectors() runs it over a row, including the
// incomplete last vector. These kernels are memory-bound: what matters is that every operand is
// read from memory once, and that neither sums nor stores keep the processor waiting.
#pragma once

#include "cpu/rows/layout-inl.h"
#include "pmf/rows.h"

namespace pmf::cpu::PMF_LEVEL {

// Vectors per iteration: as many as a RowSum has chains. More would only be more code, as the
// processor overlaps iterations by itself.
constexpr int kUnrolled = 2;

// Calls body(i, part, slot) for i = 0, step, 2 step, ... < width in the steps of layout L; slot
// says which of an iteration's vectors is the step's first.
template <typename L, typename Body>
PMF_INLINE void for_vectors(int64_t width, Body body) {
  constexpr int64_t kStep = L::kStep, kSteps = kUnrolled / L::kVectors;
  int64_t i = 0;
  for (; i + kSteps * kStep <= width; i += kSteps * kStep) {
    PMF_UNROLL for (int k = 0; k < kSteps; ++k) body(i + k * kStep, Whole{}, k * L::kVectors);
  }
  if constexpr (kSteps > 1) {
    for (; i + kStep <= width; i += kStep) body(i, Whole{}, 0);
  }
  if (i < width) body(i, Part{width - i}, 0);
}

// A sum over a row, in two chains of additions: with two sums, or two rows, in flight that hides an
// FMA's latency.
template <typename A>
struct RowSum {
  Vec<A> chains[kUnrolled] = {};

  PMF_INLINE void add(Vec<A> a, Vec<A> b, int slot) { chains[slot] = fma(a, b, chains[slot]); }
  PMF_INLINE void add(Pairs<A> a, Pairs<A> b, int slot) {
    add(a.even, b.even, slot);
    add(a.odd, b.odd, slot + 1);
  }
  PMF_INLINE Vec<A> lanes() const { return chains[0] + chains[1]; }
};

// One half of each run of kRun lanes of two vectors.
template <int kRun, int kHalf>
struct HalvesOfRuns {
  static constexpr int lane(int j) {
    constexpr int lanes = kRun / 2;
    return j / lanes * kRun + kHalf * lanes + j % lanes;
  }
};
// Lane k < n of the result is the sum of the lanes of v[k], added by halves; v is overwritten.
template <typename A, int kRun = kLanes<A>>
PMF_INLINE Vec<A> sum_each(Vec<A>* v, int64_t n) {
  if constexpr (kRun == 1) {
    return v[0];
  } else {
    for (int64_t i = 0; 2 * i < n; ++i) {
      const Vec<A> a = v[2 * i], b = v[min64(2 * i + 1, n - 1)];
      v[i] = shuffle<HalvesOfRuns<kRun, 0>>(a, b) + shuffle<HalvesOfRuns<kRun, 1>>(a, b);
    }
    return sum_each<A, kRun / 2>(v, (n + 1) / 2);
  }
}

PMF_INLINE Vec<float> root(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
PMF_INLINE Vec<double> root(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// ---- Rows ---------------------------------------------------------------------------------------

// Rows a constant distance apart.
template <typename T>
struct Stretch {
  T* first;
  int64_t stride;

  PMF_INLINE T* operator[](int64_t k) const { return first + k * stride; }
};

// The position of row `row`; next() is cheaper than a new cursor.
struct Cursor {
  const RowShape& shape;
  int64_t index[kMaxLeading];

  PMF_INLINE Cursor(const RowShape& s, int64_t row) : shape(s) {
    for (int d = s.leading - 1; d >= 0; --d) {
      index[d] = row % s.size[d];
      row /= s.size[d];
    }
  }
  PMF_INLINE void next() {
    for (int d = shape.leading - 1; d >= 0; --d) {
      if (++index[d] < shape.size[d]) return;
      index[d] = 0;
    }
  }
  // The number of rows before the innermost dimension wraps, and a jump to the row where it does.
  PMF_INLINE int64_t left() const {
    const int inner = shape.leading - 1;
    return inner < 0 ? 1 : shape.size[inner] - index[inner];
  }
  PMF_INLINE void next_stretch() {
    const int inner = shape.leading - 1;
    if (inner >= 0) index[inner] = shape.size[inner] - 1;
    next();
  }
  PMF_INLINE int64_t offset(const int64_t* stride) const {
    int64_t sum = 0;
    for (int d = 0; d < shape.leading; ++d) sum += index[d] * stride[d];
    return sum;
  }
  template <typename T>
  PMF_INLINE const T* at(const ConstRows& rows) const {
    return static_cast<const T*>(rows.data) + offset(rows.stride);
  }
  template <typename T>
  PMF_INLINE T* at(const Rows& rows) const {
    return static_cast<T*>(rows.data) + offset(rows.stride);
  }
  template <typename T>
  PMF_INLINE Stretch<const T> stretch(const ConstRows& rows) const {
    return {at<T>(rows), inner_stride(rows.stride)};
  }
  template <typename T>
  PMF_INLINE Stretch<T> stretch(const Rows& rows) const {
    return {at<T>(rows), inner_stride(rows.stride)};
  }
  PMF_INLINE int64_t inner_stride(const int64_t* stride) const {
    return shape.leading > 0 ? stride[shape.leading - 1] : 0;
  }
};

// Calls body(cursor, count) for stretches of rows a constant distance apart that cover the rows
// [begin, end); `row` is at the first.
template <typename Position, typename Body>
PMF_INLINE void for_stretches(Position row, int64_t begin, int64_t end, const Body& body) {
  while (begin < end) {
    const int64_t count = min64(end - begin, row.left());
    body(row, count);
    row.next_stretch();
    begin += count;
  }
}

// ---- Threads ------------------------------------------------------------------------------------

// Calls body(first, last) on disjoint ranges that cover [0, count).
template <typename Body>
PMF_INLINE void parallel_ranges(const ParallelFor& parallel, int64_t count, int64_t grain,
                                const Body& body) {
  parallel(
      0, count, grain,
      [](void* ctx, int64_t begin, int64_t end) { (*static_cast<const Body*>(ctx))(begin, end); },
      const_cast<Body*>(&body));
}

// Fewest rows worth a thread: about 32 thousand elements.
PMF_INLINE int64_t row_grain(int64_t width) {
  constexpr int64_t kElements = 32768;
  return max64(1, kElements / max64(1, width));
}

// Calls body(cursor) for every row.
template <typename Body>
PMF_INLINE void for_rows(const RowShape& shape, const ParallelFor& parallel, const Body& body) {
  parallel_ranges(parallel, shape.rows(), row_grain(shape.width), [&](int64_t begin, int64_t end) {
    Cursor cursor(shape, begin);
    for (int64_t row = begin; row < end; ++row, cursor.next()) body(cursor);
  });
}

// Calls body(cursor, count) for stretches that cover all rows.
template <typename Body>
PMF_INLINE void for_stretches(const RowShape& shape, const ParallelFor& parallel,
                              const Body& body) {
  parallel_ranges(parallel, shape.rows(), row_grain(shape.width), [&](int64_t begin, int64_t end) {
    for_stretches(Cursor(shape, begin), begin, end, body);
  });
}

// ---- Sums over rows -----------------------------------------------------------------------------

// acc += a b for one step of a run's sums, which are padded to whole steps and lie in memory as
// they do in registers.
template <typename A>
PMF_INLINE void accumulate(A* acc, Vec<A> a, Vec<A> b) {
  store(acc, fma(a, b, load(acc)));
}
template <typename A>
PMF_INLINE void accumulate(A* acc, Pairs<A> a, Pairs<A> b) {
  accumulate(acc, a.even, b.even);
  accumulate(acc + kLanes<A>, a.odd, b.odd);
}
template <typename A>
PMF_INLINE void add_sums(Vec<A>& total, const A* sums) {
  total += load(sums);
}
template <typename A>
PMF_INLINE void add_sums(Pairs<A>& total, const A* sums) {
  total.even += load(sums);
  total.odd += load(sums + kLanes<A>);
}

// Calls body(first row, end row, vectors) for every run of every group of `rows` rows. Each run has
// `kinds` contiguous, zeroed vectors of sums.pitch accumulators.
template <typename A, typename Body>
PMF_INLINE void for_runs(const RowSums& sums, int64_t groups, int64_t rows, int kinds,
                         void* workspace, const ParallelFor& parallel, const Body& body) {
  parallel_ranges(parallel, groups * sums.runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t group = run / sums.runs, first = (run % sums.runs) * sums.run_rows;
      A* vectors = static_cast<A*>(workspace) + run * kinds * sums.pitch;
      for (int64_t i = 0; i < kinds * sums.pitch; ++i) vectors[i] = 0;
      body(group * rows + first, group * rows + min64(first + sums.run_rows, rows), vectors);
    }
  });
}

// out[group, i] = the sum over the group's runs, in order, of the vectors of kind `kind`, which
// values of layout L were accumulated into.
template <typename L>
PMF_INLINE void add_runs(const RowSums& sums, int64_t groups, int64_t width, int kinds, int kind,
                         const void* workspace, void* out, const ParallelFor& parallel) {
  using T = Element<L>;
  using A = Acc<T>;
  const int64_t grain = max64(1, row_grain(width) / max64(1, sums.runs));
  parallel_ranges(parallel, groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const A* vectors =
          static_cast<const A*>(workspace) + (group * sums.runs * kinds + kind) * sums.pitch;
      T* result = static_cast<T*>(out) + group * width;
      for_vectors<L>(width, [&](int64_t i, auto part, int) PMF_ALWAYS {
        typename L::Value total = {};
        for (int64_t run = 0; run < sums.runs; ++run) {
          add_sums(total, vectors + run * kinds * sums.pitch + i);
        }
        put(result + i, total, part);
      });
    }
  });
}

// ---- Element types ------------------------------------------------------------------------------

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the T that `dtype` names, one of those that this level computes.
template <typename Body>
PMF_INLINE void with_type(DType dtype, const Body& body) {
#if defined(__AVX512BF16__)
  body(Type<bf16>{});
#else
  switch (dtype) {
    case DType::f32:
      return body(Type<float>{});
    case DType::bf16:
      return body(Type<bf16>{});
    case DType::f16:
      return body(Type<f16>{});
    case DType::f64:
      return body(Type<double>{});
  }
#endif
}

}  // namespace pmf::cpu::PMF_LEVEL
