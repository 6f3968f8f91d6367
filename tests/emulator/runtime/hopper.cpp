#include "hopper.h"

#include <algorithm>
#include <cstring>

#include "emulator/numbers.h"
#include "memory.h"
#include "sums.h"

namespace pmf::emulator {

Hopper hopper;

namespace {

constexpr int kRegisterFile = 65536, kMostRegisters = 248, kRegisterStep = 8;
constexpr int kGroup = 4, kRows = 16, kDepth = 16, kChunk = 16;
constexpr size_t kKeptChains = 128;
constexpr int kChainMask = (1 << 14) - 1, kPlaceBits = 7;
constexpr int64_t kMostBytes = (1 << 20) - 1;

#define PMF_HERE machine.called_from(__builtin_return_address(0))

std::string hex(uint32_t x) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%x", x);
  return text;
}

unsigned char* shared_at(uint32_t address) {
  return memory.shared() + (int64_t{address} - kSharedWindow);
}

// Bits 4 to 6 of an address, exclusive-or the row in a repeat of eight.
uint32_t swizzled(uint32_t address, uint32_t bytes) {
  return address ^ ((address >> 7 & (bytes / 16 - 1)) << 4);
}

uint32_t held(int chain, int place) {
  return kHeldSum | uint32_t(chain & kChainMask) << kPlaceBits | uint32_t(place);
}

}  // namespace

// ---- blocks -------------------------------------------------------------------------------------

void Hopper::begin_block(int threads, int warps) {
  barriers_.clear();
  for (const BoxCopy& copy : copies_) memory.copy_dropped(shared_at(copy.to), copy.map.bytes());
  copies_.clear();
  // Numbers of their own, as registers may still hold sums of the blocks before.
  for (const Products& p : products_) {
    next_chain_ = std::max(next_chain_, p.first_chain + int(p.chains.size()));
  }
  for (Products& p : products_) {
    p = {};
    p.first_chain = next_chain_;
  }
  for (auto& issued : issued_) issued.clear();
  warps_ = warps;
  const int each = std::min(kRegisterFile / std::max(threads, 1) / kRegisterStep * kRegisterStep,
                            kMostRegisters);
  for (int w = 0; w < warps; ++w) registers_[w] = each;
  free_registers_ = 0;
}

uint32_t Hopper::last_clock() const {
  uint32_t last = 0;
  for (const auto& [address, b] : barriers_) last = std::max(last, machine.first_clock() + b.phase);
  return last;
}

bool Hopper::waits(Warp& w) {
  if (w.wanted_registers == 0) return false;
  const int more = (w.wanted_registers - registers_[w.number]) * kLanes;
  if (more > free_registers_) return true;
  free_registers_ -= more;
  registers_[w.number] = w.wanted_registers;
  w.wanted_registers = 0;
  return false;
}

std::string Hopper::left_over() const {
  if (!copies_.empty()) {
    return "a block that ends while a copy of a box to shared memory at " +
           std::to_string(copies_[0].to - kSharedWindow) + " is under way";
  }
  for (const auto& [address, b] : barriers_) {
    if (b.landed) {
      return "a block that ends and never waited for the copies of " + describe(address);
    }
  }
  for (int w = 0; w < warps_; ++w) {
    if (!products_[w].pending.empty()) {
      return "warp " + std::to_string(w) + " has ended without waiting for its products";
    }
    if (w % kGroup > 0 && products_[w].issued != products_[w - 1].issued) {
      return "warps " + std::to_string(w - 1) + " and " + std::to_string(w) +
             " of one warpgroup have made " + std::to_string(products_[w - 1].issued) + " and " +
             std::to_string(products_[w].issued) + " products";
    }
  }
  return "";
}

// ---- mbarriers ----------------------------------------------------------------------------------

std::string Hopper::describe(uint32_t barrier) const {
  const std::string name = "the mbarrier at " + std::to_string(barrier - kSharedWindow);
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end()) return name;
  const Barrier& b = found->second;
  return name + " (phase " + std::to_string(b.phase) + ", " + std::to_string(b.missing) + " of " +
         std::to_string(b.arrivals) + " arrivals and " + std::to_string(b.bytes) +
         " bytes missing)";
}

void Hopper::init(uint32_t barrier, uint32_t arrivals) {
  check_alignment(shared_at(barrier), 8, "an mbarrier");
  memory.access(shared_at(barrier), 8, Access::write);
  if (arrivals < 1 || arrivals > kMostBytes) machine.fail("an mbarrier of no arrivals");
  const auto [place, fresh] = barriers_.try_emplace(barrier);
  if (fresh && barriers_.size() > size_t(kMaxBarriers)) machine.fail("more than 64 mbarriers");
  const int number = fresh ? int(barriers_.size()) - 1 : place->second.number;
  place->second = {};
  place->second.number = number, place->second.initialiser = machine.lane->number;
  place->second.arrivals = place->second.missing = arrivals;
}

void Hopper::init_fence() {
  for (auto& [address, b] : barriers_) b.visible |= b.initialiser == machine.lane->number;
}

Hopper::Barrier& Hopper::at(uint32_t barrier) {
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end()) {
    machine.fail("shared memory at " + std::to_string(barrier - kSharedWindow) +
                 " is used as an mbarrier and was never initialised");
  }
  memory.access(shared_at(barrier), 8, Access::read);
  return found->second;
}

void Hopper::end_phase(Barrier& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  b.now.of[kMaxWarps + b.number] = machine.first_clock() + b.phase;
  b.before.merge(b.now);
  b.now = {};
  b.phase += 1;
  b.missing = b.arrivals;
}

void Hopper::arrive(uint32_t barrier, uint32_t bytes) {
  Barrier& b = at(barrier);
  b.bytes += bytes;
  if (b.bytes > kMostBytes) machine.fail(describe(barrier) + " counts fewer than 2^20 bytes");
  if (b.missing == 0) machine.fail("one arrival too many at " + describe(barrier));
  b.missing -= 1;
  // What other lanes did since the warp last synchronised does not come before.
  b.now.merge(machine.warp->known);
  if (machine.lane->has_acquired) b.now.merge(machine.lane->acquired);
  end_phase(b);
}

bool Hopper::over(uint32_t barrier, uint32_t parity) {
  return (barriers_[barrier].phase & 1) != parity;
}

void Hopper::wait(uint32_t barrier, uint32_t parity) {
  Barrier& b = at(barrier);
  if (parity > 1) machine.fail("an mbarrier's parity is 0 or 1, not " + std::to_string(parity));
  Lane& lane = *machine.lane;
  if (!over(barrier, parity)) machine.wait_for_phase(barrier, parity);
  b.landed = false;
  if (!lane.has_acquired) lane.acquired = {};
  lane.has_acquired = true;
  lane.acquired.merge(b.before);
}

// ---- copies of boxes ----------------------------------------------------------------------------

namespace {

// Calls row(offset in the box, address or null, elements inside) for each row of the box: what is
// outside the tensor has no address.
template <class Row>
void rows_of(const BoxMap& map, const int32_t* place, Row row) {
  const uint64_t row_bytes = uint64_t(map.box[0]) * uint32_t(map.element_bytes);
  uint64_t count = 1;
  for (int d = 1; d < map.rank; ++d) count *= map.box[d];
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t rest = i, address = map.base;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t x = place[d] + int64_t(rest % map.box[d]);
      rest /= map.box[d];
      inside &= x >= 0 && x < int64_t(map.sizes[d]);
      address += uint64_t(x) * map.strides[d - 1];
    }
    row(i * row_bytes, inside ? address : 0);
  }
}

// The part of a row of the box that lies in the tensor: first and last element of the box.
void inside_of(const BoxMap& map, int32_t place, int64_t& first, int64_t& last) {
  first = std::max<int64_t>(0, -int64_t(place));
  last = std::min<int64_t>(map.box[0], int64_t(map.sizes[0]) - place);
}

}  // namespace

void Hopper::copy(uint32_t to, const BoxMap& map, uint32_t barrier, const int32_t* place) {
  if (map.mark != BoxMap::kMark) machine.fail("a tensor map that nobody encoded");
  if (map.rank != 4) {
    machine.fail("a copy in 4 dimensions with a map of " + std::to_string(map.rank));
  }
  check_alignment(shared_at(to), 128, "a copy of a box");
  const Barrier& b = at(barrier);
  if (!b.visible) {
    machine.fail(describe(barrier) +
                 " counts a copy's bytes, with no fence after its initialisation");
  }
  int64_t first, last;
  inside_of(map, place[0], first, last);
  rows_of(map, place, [&](uint64_t, uint64_t address) {
    if (address == 0 || first >= last) return;
    const auto* from =
        reinterpret_cast<const char*>(address) + (place[0] + first) * int64_t(map.element_bytes);
    memory.access(from, size_t((last - first) * map.element_bytes), Access::read);
  });
  memory.box_issued(shared_at(to), map.bytes());
  copies_.push_back({map, {place[0], place[1], place[2], place[3], 0}, to, barrier});
}

void Hopper::land_one() {
  const size_t which = machine.random(unsigned(copies_.size()));
  const BoxCopy copy = copies_[which];
  copies_.erase(copies_.begin() + int64_t(which));
  Barrier& b = barriers_[copy.barrier];
  const uint32_t stamp =
      (machine.first_clock() + b.phase) << kThreadBits | uint32_t(kMaxThreads + b.number * kLanes);
  const BoxMap& map = copy.map;
  int64_t first, last;
  inside_of(map, copy.place[0], first, last);
  const uint32_t row_bytes = map.box[0] * uint32_t(map.element_bytes);
  std::vector<unsigned char> values(row_bytes);
  rows_of(map, copy.place, [&](uint64_t offset, uint64_t address) {
    std::fill(values.begin(), values.end(), 0);
    if (address != 0 && first < last) {
      std::memcpy(values.data() + first * map.element_bytes,
                  reinterpret_cast<const char*>(address) +
                      (copy.place[0] + first) * int64_t(map.element_bytes),
                  size_t((last - first) * map.element_bytes));
    }
    for (uint32_t c = 0; c < row_bytes; c += kChunk) {
      const uint32_t at = swizzled(copy.to + uint32_t(offset) + c, map.swizzle_bytes);
      memory.box_landed(shared_at(at), values.data() + c, kChunk, stamp);
    }
  });
  b.bytes -= int64_t(map.bytes());
  b.landed = true;
  end_phase(b);
}

bool encode_tensor_map(void* to, const void* base, int element_bytes, int rank,
                       const uint64_t* sizes, const uint64_t* stride_bytes, const uint32_t* box,
                       uint32_t swizzle_bytes) {
  BoxMap map = {};
  map.mark = BoxMap::kMark;
  map.rank = rank, map.element_bytes = element_bytes, map.swizzle_bytes = swizzle_bytes;
  map.base = reinterpret_cast<uint64_t>(base);
  // A row narrower than the swizzle would do on a device, with gaps in shared memory.
  bool possible = reinterpret_cast<uintptr_t>(to) % 64 == 0 && map.base % kChunk == 0 &&
                  rank >= 3 && rank <= 5 && box[0] * uint32_t(element_bytes) == swizzle_bytes;
  for (int d = 0; d < rank; ++d) {
    possible &= sizes[d] >= 1 && sizes[d] <= uint64_t{1} << 32 && box[d] >= 1 && box[d] <= 256;
    map.sizes[d] = uint32_t(sizes[d]), map.box[d] = box[d];
    if (d == 0) continue;
    const uint64_t stride = stride_bytes[d - 1];
    possible &= stride % kChunk == 0 && stride < uint64_t{1} << 40;
    map.strides[d - 1] = stride;
  }
  if (possible) std::memcpy(to, &map, sizeof(map));
  return possible;
}

// ---- products -----------------------------------------------------------------------------------

template <class Piece>
void Hopper::pieces(uint64_t descriptor, bool transposed, int first, int rows, const char* name,
                    Piece piece) {
  const auto field = [&](int at) { return uint32_t(descriptor >> at & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto mode = uint32_t(descriptor >> 62);
  constexpr uint64_t kUsed = 0xc000000000000000ull | 0x3fff3fff3fffull;
  if (mode == 0 || (descriptor & ~kUsed) != 0) {
    machine.fail(std::string("the descriptor of ") + name + " has a mode or bits of " +
                 hex(uint32_t(descriptor >> 32)) + " that the emulator does not know");
  }
  const uint32_t width = 256 >> mode, repeat = 8 * width;
  const uint32_t beyond = start % repeat;
  // Along a row K may begin at any two chunks; where it runs across rows, at any eight of them.
  if (transposed ? beyond != 0 : beyond >= width || beyond % 32 != 0) {
    machine.fail(std::string("the descriptor of ") + name + " begins " + std::to_string(beyond) +
                 " bytes beyond a multiple of " + std::to_string(repeat));
  }
  if (stride % repeat != 0 || (transposed && leading % repeat != 0)) {
    machine.fail(std::string("the descriptor of ") + name +
                 " has strides that are no multiples of " + std::to_string(repeat));
  }
  if (!transposed) {
    for (int r = first; r < first + rows; ++r) {
      const uint32_t row = start + uint32_t(r) / 8 * stride + uint32_t(r) % 8 * width;
      for (int c = 0; c < 2; ++c) piece(swizzled(row + uint32_t(c) * kChunk, width), r, c);
    }
    return;
  }
  const int chunks_a_piece = int(width) / kChunk;
  for (int k = 0; k < kDepth; ++k) {
    for (int c = 0; c < rows / 8; ++c) {
      const uint32_t place = start + uint32_t(c / chunks_a_piece) * leading +
                             uint32_t(k) / 8 * stride + uint32_t(k) % 8 * width +
                             uint32_t(c % chunks_a_piece) * kChunk;
      piece(swizzled(place, width), k, c);
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
      machine.fail("the sums of this product overlap those of another one that is under way");
    }
    if (chain(p, number).under_way == 0) {
      machine.fail("sums of a product that has been waited for are used as if it had not");
    }
    return number;
  }
  if (!p.fenced) machine.fail("a product on registers that were written with no wgmma.fence since");
  Chain fresh = {product.columns, 0, std::vector<float>(size_t(kLanes * count))};
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < count; ++i) {
      if (is_under_way(bits(lane, i)) || (product.adds && held_sum(bits(lane, i)))) {
        machine.fail("the sums of this product overlap those of another one that is under way");
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
      machine.fail("the warps of one warpgroup make different products");
    }
  }
  p.issued += 1;
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
      // Columns 2 t and 2 t + 1 of eight are lane 4 g + t's.
      float c[kColumns];
      const auto place = [&](int column) {
        const int lane = row % 8 * 4 + column / 2;
        return &sums.sums[size_t(lane * count) + 4 * j + size_t(row / 8 * 2 + column % 2)];
      };
      for (int n = 0; n < kColumns; ++n) c[n] = product.adds ? *place(n) : 0.0f;
      add_products(c, a[row], b[j], kDepth, false);
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
  if (number < p.first_chain) return x;  // of old: nobody will use it
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

void Hopper::set_registers(int count, bool more) {
  Warp& w = *machine.warp;
  int& own = registers_[w.number];
  if (count < 24 || count > 256 || count % kRegisterStep != 0) {
    machine.fail("setmaxnreg takes 24 to 256 in steps of 8, got " + std::to_string(count));
  }
  if (more ? count < own : count > own) {
    machine.fail("setmaxnreg from " + std::to_string(own) + (more ? " up" : " down") + " to " +
                 std::to_string(count));
  }
  if (more) {
    w.wanted_registers = count;
  } else {
    free_registers_ += (own - count) * kLanes;
    own = count;
  }
}

// ---- the doors ----------------------------------------------------------------------------------

namespace {

void whole_warp(const char* what) {
  if (machine.warp->count != kLanes) machine.fail(std::string(what) + " needs a warp of 32 lanes");
}

}  // namespace

uint32_t shared_address(const void* generic) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(generic) - memory.shared() +
                               kSharedWindow);
}

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  PMF_HERE;
  hopper.init(barrier, arrivals);
}
void mbarrier_init_fence() {
  PMF_HERE;
  hopper.init_fence();
}
void mbarrier_arrive(uint32_t barrier, uint32_t bytes) {
  PMF_HERE;
  hopper.arrive(barrier, bytes);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  PMF_HERE;
  hopper.wait(barrier, parity);
}
void fence_proxy_async() { machine.lane->proxy_fences += 1; }

void copy_box(uint32_t to, const void* map, uint32_t barrier, Word4 place) {
  PMF_HERE;
  BoxMap box;
  std::memcpy(&box, map, sizeof(box));
  const int32_t at[] = {int32_t(place[0]), int32_t(place[1]), int32_t(place[2]), int32_t(place[3])};
  hopper.copy(to, box, barrier, at);
}

void wgmma(const Product& product, float* sums, const uint32_t* a, bool holds) {
  PMF_HERE;
  whole_warp("wgmma");
  machine.lane->sums = sums, machine.lane->factor = a;
  machine.together(Together::wgmma, product.columns << 1 | int(product.adds),
                   [&] { hopper.multiply(product, holds); });
}
void wgmma_fence() {
  PMF_HERE;
  machine.together(Together::wgmma_fence, 0, [] { hopper.fence(); });
}
void wgmma_commit() {
  PMF_HERE;
  machine.together(Together::wgmma_commit, 0, [] { hopper.commit(); });
}
void wgmma_wait(int pending) {
  PMF_HERE;
  machine.together(Together::wgmma_wait, pending, [=] { hopper.wait(pending); });
}
float waited_for(float x) { return hopper.waited_for(x); }

bool elect_one() {
  PMF_HERE;
  // No lane in particular, but the same one throughout a launch.
  machine.together(Together::elect, 0, [] {});
  return machine.lane->number % kLanes == int(machine.launches * 7 % kLanes);
}

void set_registers(int count, bool more) {
  PMF_HERE;
  machine.together(Together::set_registers, count << 1 | int(more),
                   [=] { hopper.set_registers(count, more); });
  while (machine.warp->wanted_registers != 0) machine.yield();
}

void barrier_arrive(int barrier, int threads) {
  PMF_HERE;
  machine.barrier(barrier, threads, false);
}

}  // namespace pmf::emulator
