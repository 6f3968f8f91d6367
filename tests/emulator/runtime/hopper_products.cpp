// wgmma: from its operands' descriptors to its sums.
#include <algorithm>
#include <cstring>

#include "emulator/numbers.h"
#include "hopper.h"
#include "sums.h"

namespace pmf::emulator {

namespace {

constexpr int kRows = 16, kDepth = 16;
constexpr size_t kKeptChains = 128;
constexpr int kChainMask = (1 << 14) - 1, kPlaceBits = 7;

uint32_t held(int chain, int place) {
  return kHeldSum | uint32_t(chain & kChainMask) << kPlaceBits | uint32_t(place);
}

}  // namespace

template <class Piece>
void Hopper::pieces(uint64_t descriptor, bool transposed, int first, int rows, const char* name,
                    Piece piece) {
  const auto field = [&](int at) { return uint32_t(descriptor >> at & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto mode = uint32_t(descriptor >> 62);
  constexpr uint64_t kUsed = 0xc000000000000000ull | 0x3fff3fff3fffull;
  if (mode == 0 || (descriptor & ~kUsed) != 0) {
    machine.fail(std::string("the descriptor of ") + name + " has upper bits " +
                 hex(uint32_t(descriptor >> 32)) + ", which the emulator does not support");
  }
  const uint32_t width = 256 >> mode, repeat = 8 * width;
  const uint32_t beyond = start % repeat;
  // Along a row K may begin at any two chunks; where it runs across rows, at any eight of them.
  if (transposed ? beyond != 0 : beyond >= width || beyond % 32 != 0) {
    machine.fail(std::string("the descriptor of ") + name + " starts " + std::to_string(beyond) +
                 " bytes past a multiple of " + std::to_string(repeat));
  }
  if (stride % repeat != 0 || (transposed && leading % repeat != 0)) {
    machine.fail(std::string("the descriptor of ") + name +
                 " has strides that are not multiples of " + std::to_string(repeat));
  }
  if (!transposed) {
    for (int r = first; r < first + rows; ++r) {
      const uint32_t row = start + uint32_t(r) / 8 * stride + uint32_t(r) % 8 * width;
      for (int c = 0; c < 2; ++c) {
        piece(in_cluster(swizzled(row + uint32_t(c) * kChunk, width)), r, c);
      }
    }
    return;
  }
  const int chunks_a_piece = int(width) / kChunk;
  for (int k = 0; k < kDepth; ++k) {
    for (int c = 0; c < rows / 8; ++c) {
      const uint32_t place = start + uint32_t(c / chunks_a_piece) * leading +
                             uint32_t(k) / 8 * stride + uint32_t(k) % 8 * width +
                             uint32_t(c % chunks_a_piece) * kChunk;
      piece(in_cluster(swizzled(place, width)), k, c);
    }
  }
}

// The chain that this product continues, or a new one. A product that does not add may find
// anything in its registers, such as sums of an earlier block.
int Hopper::chain_of(Products& p, const Product& product) {
  const Warp& w = *machine.warp;
  const int count = product.columns / 2;
  const auto bits = [&](int lane, int i) {
    return __builtin_bit_cast(uint32_t, w.lanes[lane].sums[i]);
  };
  const uint32_t first = bits(0, 0);
  const int newest = p.first_chain + int(p.chains.size()) - 1;
  const auto chain_in = [&](uint32_t sum) {
    return newest - ((newest - int(sum >> kPlaceBits & kChainMask)) & kChainMask);
  };
  const auto is_known = [&](uint32_t sum) {
    return held_sum(sum) && chain_in(sum) >= p.first_chain;
  };
  const auto is_under_way = [&](uint32_t sum) {
    return is_known(sum) && chain(p, chain_in(sum)).under_way > 0;
  };
  if (is_under_way(first) || (product.adds && held_sum(first))) {
    const int number = chain_in(first);
    bool same = is_known(first) && chain(p, number).columns == product.columns;
    for (int lane = 0; lane < kLanes && same; ++lane) {
      for (int i = 0; i < count; ++i) same = same && bits(lane, i) == held(number, i);
    }
    if (!same) {
      machine.fail("the sums of this product overlap those of another one in flight");
    }
    if (chain(p, number).under_way == 0) {
      machine.fail("sums are used as if their product, already waited for, were in flight");
    }
    return number;
  }
  if (!p.fenced)
    machine.fail("a product uses registers with no wgmma.fence after they were written");
  Chain fresh = {product.columns, 0, std::vector<float>(size_t(kLanes * count))};
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < count; ++i) {
      if (is_under_way(bits(lane, i)) || (product.adds && held_sum(bits(lane, i)))) {
        machine.fail("the sums of this product overlap those of another one in flight");
      }
      fresh.sums[size_t(lane * count + i)] = w.lanes[lane].sums[i];
    }
  }
  p.chains.push_back(std::move(fresh));
  if (p.chains.size() > kKeptChains && p.chains.front().under_way == 0) {
    p.chains.pop_front();
    p.first_chain += 1;
  }
  return p.first_chain + int(p.chains.size()) - 1;
}

void Hopper::multiply(const Product& product, bool holds) {
  const Warp& w = *machine.warp;
  Products& p = products_[w.number];
  const int in_group = w.number % kGroup;
  std::vector<Product>& group = issued_[w.number / kGroup];
  if (p.issued == group.size()) {
    group.push_back(product);
  } else {
    const Product& other = group[p.issued];
    if (other.a != product.a || other.b != product.b || other.columns != product.columns ||
        other.adds != product.adds) {
      machine.fail("the warps of one warpgroup issue different products");
    }
  }
  p.issued += 1;
  ++machine.warpgroup_products;
  Pending op = {product, chain_of(p, product), p.group, {}};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (product.in_registers) std::memcpy(op.a[lane], w.lanes[lane].factor, sizeof(op.a[lane]));
  }
  const auto begins = [](uint32_t at, int, int) { memory.product_begins(shared_at(at), kChunk); };
  if (!product.in_registers) pieces(product.a, false, in_group * kRows, kRows, "A", begins);
  pieces(product.b, product.transposed, 0, product.columns, "B", begins);
  Chain& sums = chain(p, op.chain);
  sums.under_way += 1;
  const int count = product.columns / 2;
  for (int lane = 0; lane < kLanes; ++lane) {
    Lane& l = w.lanes[lane];
    for (int i = 0; i < count; ++i) {
      l.sums[i] = __builtin_bit_cast(float, held(op.chain, i));
    }
    if (!holds) continue;
    if (sums.under_way == 1) {
      l.held.push_back({reinterpret_cast<char*>(l.sums), size_t(count) * 4, true, op.chain});
    }
    if (product.in_registers) {
      l.held.push_back(
          {reinterpret_cast<char*>(const_cast<uint32_t*>(l.factor)), 16, false, op.chain});
    }
  }
  p.pending.push_back(op);
}

void Hopper::compute(const Pending& op, Chain& sums) {
  const Product& product = op.product;
  const int least = product.element == Element::f16 ? -14 : -126;
  const auto number = [&](uint32_t bits) {
    return product.element == Element::bf16 ? float(BFloat16::from_bits(bits & 0xffff))
                                            : float(Half::from_bits(bits & 0xffff));
  };
  Row a[kRows];
  const auto put_a = [&](int row, int k, uint32_t bits) {
    a[row].value[k] = number(bits), a[row].exponent[k] = exponent_of(float(a[row].value[k]), least);
  };
  const int first = machine.warp->number % kGroup * kRows;
  if (product.in_registers) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        put_a(row, k, op.a[lane][i]);
        put_a(row, k + 1, op.a[lane][i] >> 16);
      }
    }
  } else {
    pieces(product.a, false, first, kRows, "A", [&](uint32_t at, int row, int c) {
      uint16_t of[8];
      std::memcpy(of, shared_at(at), kChunk);
      memory.product_ends(shared_at(at), kChunk);
      for (int i = 0; i < 8; ++i) put_a(row - first, 8 * c + i, of[i]);
    });
  }
  std::vector<Columns> b(size_t(product.columns / kColumns));
  pieces(product.b, product.transposed, 0, product.columns, "B", [&](uint32_t at, int row, int c) {
    uint16_t of[8];
    std::memcpy(of, shared_at(at), kChunk);
    memory.product_ends(shared_at(at), kChunk);
    for (int i = 0; i < 8; ++i) {
      const int k = product.transposed ? row : 8 * c + i;
      const int column = product.transposed ? 8 * c + i : row;
      Columns& to = b[size_t(column / kColumns)];
      to.value[k][column % kColumns] = number(of[i]);
      to.exponent[k][column % kColumns] = exponent_of(number(of[i]), least);
    }
  });
  const int count = product.columns / 2;
  for (int row = 0; row < kRows; ++row) {
    for (size_t j = 0; j < b.size(); ++j) {
      // Lane 4 g + t holds columns 2 t and 2 t + 1 of eight.
      float c[kColumns];
      const auto place = [&](int column) {
        const int lane = row % 8 * 4 + column / 2;
        return &sums.sums[size_t(lane * count) + 4 * j + size_t(row / 8 * 2 + column % 2)];
      };
      for (int n = 0; n < kColumns; ++n) c[n] = product.adds ? *place(n) : 0.0f;
      add_products(c, a[row], b[j], kDepth);
      for (int n = 0; n < kColumns; ++n) *place(n) = c[n];
    }
  }
}

void Hopper::commit() { products_[machine.warp->number].group += 1; }

void Hopper::wait(int pending) {
  Warp& w = *machine.warp;
  Products& p = products_[w.number];
  while (!p.pending.empty() && p.pending.front().group < p.group - pending) {
    const Pending& op = p.pending.front();
    compute(op, chain(p, op.chain));
    chain(p, op.chain).under_way -= 1;
    p.pending.pop_front();
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    Lane& l = w.lanes[lane];
    const auto ended = [&](const Held& h) { return chain(p, h.chain).under_way == 0; };
    for (const Held& h : l.held) {
      if (!h.sums || !ended(h)) continue;
      const size_t count = h.bytes / 4;
      std::memcpy(h.begin, &chain(p, h.chain).sums[size_t(lane) * count], h.bytes);
    }
    l.held.erase(std::remove_if(l.held.begin(), l.held.end(), ended), l.held.end());
  }
  p.fenced = false;
  w.tick();
}

float Hopper::waited_for(float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  Products& p = products_[machine.warp->number];
  // Arithmetic makes the NaN a quiet one.
  if ((bits & 0x400000u) != 0) {
    machine.fail("sums of a product are used before they have been waited for");
  }
  const int newest = p.first_chain + int(p.chains.size()) - 1;
  const int number = newest - ((newest - int(bits >> kPlaceBits & kChainMask)) & kChainMask);
  const auto place = bits & ((1u << kPlaceBits) - 1);
  if (number < p.first_chain) return x;  // too old: it is not used any more
  const Chain& of = chain(p, number);
  if (of.under_way > 0) return x;
  const auto lane = uint32_t(machine.lane->number % kLanes);
  return of.sums[size_t(lane * uint32_t(of.columns / 2) + place)];
}

void Hopper::check_registers(const Lane& lane, uintptr_t at, size_t bytes, bool write) const {
  for (const Held& h : lane.held) {
    const auto begin = reinterpret_cast<uintptr_t>(h.begin);
    if (at + bytes <= begin || at >= begin + h.bytes) continue;
    if (h.sums) {
      machine.fail(std::string("sums of a product are ") + (write ? "written" : "read") +
                   " before they have been waited for");
    }
    if (write) machine.fail("the registers of A are written while a product reads them");
  }
}

}  // namespace pmf::emulator
