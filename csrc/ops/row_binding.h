// Binds tensors to rows for the elementwise ops (see pmf/rows.h).
#pragma once

#include "ops/torch_shim.h"
#include "pmf/rows.h"

namespace pmf {

// ---- checks -------------------------------------------------------------------------------------

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  return std::vector<int64_t>(t.sizes().begin(), t.sizes().end());
}

// Checks that dtype and device match.
inline void check_kind(const char* op, const char* name, const Tensor& t, const char* like_name,
                       const Tensor& like) {
  check_same_device(like, t, op, like_name, name);
  check_value(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ",
              like_name, ", got ", dtype_name(t.scalar_type()), " and ",
              dtype_name(like.scalar_type()));
}

// Checks that dtype, device and shape match.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* like_name,
                       const Tensor& like) {
  check_kind(op, name, t, like_name, like);
  check_value(sizes_of(t) == sizes_of(like), op, ": ", name, " must have the shape of ", like_name,
              " ", shape_of(like), ", got ", shape_of(t));
}

// Checks for a vector [W] that goes with an x [..., W].
inline void check_vector(const char* op, const char* name, const Tensor& t, const char* like_name,
                         const Tensor& like) {
  check_kind(op, name, t, like_name, like);
  check_value(t.dim() == 1 && t.size(0) == like.size(like.dim() - 1), op, ": ", name,
              " must be a vector of the last dimension of ", like_name, " ", shape_of(like),
              ", got ", shape_of(t));
}

// Checks a tangent of x's first samples (x's shape or a smaller first dimension); returns how many.
inline int64_t check_tangent(const char* op, const char* name, const Tensor& t,
                             const char* like_name, const Tensor& like) {
  check_kind(op, name, t, like_name, like);
  bool fits = t.dim() == like.dim();
  for (int64_t d = 0; fits && d < like.dim(); ++d) {
    const bool fewer_samples = d == 0 && like.dim() > 1 && t.size(0) < like.size(0);
    fits = t.size(d) == like.size(d) || fewer_samples;
  }
  check_value(fits, op, ": ", name, " must have the shape of ", like_name, " ", shape_of(like),
              ", or that of its first samples, got ", shape_of(t));
  return t.size(0);
}

// ---- tensors a kernel can read and write --------------------------------------------------------

inline bool has_unit_stride(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1;
}

// The tensor itself if its rows are contiguous, otherwise a copy.
inline Tensor readable(const Tensor& t) {
  return has_unit_stride(t) ? t : torch::stable::contiguous(t);
}

// Samples [first, first + count), or `t` itself if these are all.
inline Tensor samples(const Tensor& t, int64_t first, int64_t count) {
  if (count == t.size(0)) return t;
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}

inline Tensor zeros_vector(const Tensor& like, int64_t width) {
  return torch::stable::new_zeros(like, {width});
}

// The gradient of a vector shared by all rows of x, to be written by a kernel. If x is empty, no
// kernel runs and the gradient is zero already.
inline Tensor gradient_of(const Tensor& vector, const Tensor& x) {
  return x.numel() == 0 ? torch::stable::new_zeros(vector, vector.sizes())
                        : torch::stable::new_empty(vector, vector.sizes());
}

// An absent gradient reads as a repeated row of zeros.
inline Tensor or_zeros(const OptionalTensor& grad, const Tensor& like) {
  return grad ? *grad : zeros_vector(like, like.size(like.dim() - 1));
}

inline void check_like(const char* op, const char* name, const OptionalTensor& t,
                       const char* like_name, const Tensor& like) {
  if (t) check_like(op, name, *t, like_name, like);
}

// The gradient of an absent tangent of the weight.
inline Tensor no_gradient(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// A result in the memory layout of `like`. If that layout has no contiguous rows, the kernel writes
// to a buffer and result() copies it.
class Output {
 public:
  explicit Output(const Tensor& like)
      : result_(torch::stable::empty_like(like)),
        buffer_(has_unit_stride(result_) ? result_ : torch::stable::new_empty(like, like.sizes())) {
  }

  const Tensor& buffer() const { return buffer_; }
  Tensor result() {
    if (buffer_.get() != result_.get()) torch::stable::copy_(result_, buffer_);
    return result_;
  }

 private:
  Tensor result_, buffer_;
};

// ---- leading dimensions -------------------------------------------------------------------------

// Binds operands of one shape [..., W] to a kernel's row views. Operands with fewer dimensions, and
// dimensions of size 1, broadcast; an absent operand leaves its view null. finish() merges
// neighbouring dimensions that have a common stride in every operand, fills in the views and
// returns the common shape. The binder owns the copies that a kernel reads: keep it alive until
// after run().
class RowBinder {
 public:
  RowBinder(const char* op, const Tensor& like) : op_(op), sizes_(sizes_of(like)) {}

  RowBinder& bind(ConstRows& view, const Tensor& t) {
    const Tensor rows = readable(t);
    view.data = rows.const_data_ptr();
    return add(rows, view.stride);
  }
  RowBinder& bind(ConstRows& view, const OptionalTensor& t) { return t ? bind(view, *t) : *this; }
  RowBinder& bind(Rows& view, const Output& output) { return bind(view, output.buffer()); }
  RowBinder& bind(Rows& view, const std::optional<Output>& output) {
    return output ? bind(view, *output) : *this;
  }
  RowBinder& bind(Rows& view, const Tensor& t) {
    view.data = t.mutable_data_ptr();
    return add(t, view.stride);
  }
  RowBinder& bind(Rows& view, const OptionalTensor& t) { return t ? bind(view, *t) : *this; }

  RowShape finish() {
    RowShape shape;
    shape.width = sizes_.back();
    const size_t leading = sizes_.size() - 1;
    for (size_t d = 0; d < leading; ++d) {
      if (sizes_[d] == 1) continue;
      const bool merge = shape.leading > 0 && merges_into_last(shape, d);
      if (!merge) {
        check_value(shape.leading < kMaxLeading, op_, ": more than ", kMaxLeading,
                    " leading dimensions that are not contiguous with each other; call "
                    ".contiguous() first");
        ++shape.leading;
      }
      const int last = shape.leading - 1;
      shape.size[last] = merge ? shape.size[last] * sizes_[d] : sizes_[d];
      for (Operand& operand : operands_) operand.view_stride[last] = operand.stride[d];
    }
    return shape;
  }

 private:
  struct Operand {
    Tensor tensor;  // keeps a copy alive
    std::vector<int64_t> stride;
    int64_t* view_stride;
  };

  RowBinder& add(const Tensor& t, int64_t* view_stride) {
    std::vector<int64_t> stride(sizes_.size(), 0);
    const size_t missing = sizes_.size() - static_cast<size_t>(t.dim());
    for (size_t d = missing; d < sizes_.size(); ++d) {
      const int64_t own = static_cast<int64_t>(d - missing);
      if (t.size(own) != 1) stride[d] = t.stride(own);
    }
    operands_.push_back({t, stride, view_stride});
    return *this;
  }

  bool merges_into_last(const RowShape& shape, size_t d) const {
    for (const Operand& operand : operands_) {
      if (operand.view_stride[shape.leading - 1] != operand.stride[d] * sizes_[d]) return false;
    }
    return true;
  }

  const char* op_;
  std::vector<int64_t> sizes_;
  std::vector<Operand> operands_;
};

}  // namespace pmf
