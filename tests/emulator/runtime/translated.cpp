#include "translated.h"

#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/numbers.h"
#include "memory.h"

namespace pmf::emulator {
namespace {

constexpr uint32_t kWholeWarp = 0xffffffffu, kLastLane = 31;
constexpr uint32_t kCopyBytes = 16;
constexpr unsigned char kPadding = 0xa5;  // fills gaps between parameters; never read

// Records the position in the translation, whose line numbers are those of the PTX (#line).
#define PMF_HERE machine.place = __builtin_return_address(0)

void whole_warp(uint32_t lanes) {
  if (lanes != kWholeWarp) machine.fail("a lane mask that does not cover the whole warp");
}

class Machinery final : public ptx::Device {
 public:
  Index thread_index() const override { return emulator::thread_index(); }
  Index block_index() const override { return emulator::block_index(); }
  Index block_size() const override { return emulator::block_size(); }
  Index grid_size() const override { return emulator::grid_size(); }
  unsigned char* shared() const override { return memory.shared(); }

  void access(const void* address, size_t bytes, bool write) const override {
    PMF_HERE;
    check_alignment(address, bytes, write ? "a store" : "a load");
    memory.access(address, bytes, write ? Access::write : Access::read);
  }
  void copy(void* to, const void* from, uint32_t bytes, uint32_t source_bytes) const override {
    PMF_HERE;
    if (bytes != kCopyBytes || (source_bytes != kCopyBytes && source_bytes != 0)) {
      machine.fail("cp.async of " + std::to_string(source_bytes) + " of " + std::to_string(bytes) +
                   " bytes; the emulator supports 16 or 0 of 16");
    }
    emulator::copy_async(to, from, source_bytes != 0);
  }
  void commit_copies() const override { emulator::commit_copies(); }
  void wait_for_copies(int pending) const override {
    PMF_HERE;
    emulator::wait_for_copies(pending);
  }

  uint32_t shuffle(Shuffle how, uint32_t bits, uint32_t amount, uint32_t clamp,
                   uint32_t lanes) const override {
    PMF_HERE;
    whole_warp(lanes);
    if (clamp != kLastLane)
      machine.fail("a shuffle within parts of a warp, which the emulator does not support");
    if (amount >= uint32_t(kLanes)) {
      machine.fail("a shuffle reads lane " + std::to_string(amount) + " of a warp of 32");
    }
    return static_cast<uint32_t>(emulator::shuffle(how, bits, static_cast<int>(amount)));
  }
  uint32_t ballot(bool value, uint32_t lanes) const override {
    PMF_HERE;
    whole_warp(lanes);
    return emulator::ballot(value);
  }
  void sync_warp(uint32_t lanes) const override {
    PMF_HERE;
    whole_warp(lanes);
    emulator::sync_warp();
  }
  void barrier(int line, uint32_t id, uint32_t threads) const override {
    PMF_HERE;
    machine.aligned_line = line;
    machine.barrier(static_cast<int>(id), static_cast<int>(threads));
  }
  Word4 load_matrices(int line, const void* row, int count, bool transposed) const override {
    PMF_HERE;
    machine.aligned_line = line;
    return emulator::load_matrices(row, count, transposed);
  }
  Float4 multiply(int line, Element element, Float4 c, Word4 a, uint64_t b) const override {
    PMF_HERE;
    machine.aligned_line = line;
    return emulator::multiply(element, c, a, b);
  }

  void mbarrier_init(uint32_t barrier, uint32_t arrivals) const override {
    PMF_HERE;
    emulator::mbarrier_init(barrier, arrivals);
  }
  void mbarrier_init_fence() const override { emulator::mbarrier_init_fence(); }
  void mbarrier_arrive(uint32_t barrier, uint32_t bytes) const override {
    PMF_HERE;
    emulator::mbarrier_arrive(barrier, bytes);
  }
  // May return false before the phase completes, as a device may after a time limit.
  bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) const override {
    PMF_HERE;
    if (machine.random(4) == 0) return false;
    emulator::mbarrier_wait(barrier, parity);
    return true;
  }
  void fence_proxy_async() const override { emulator::fence_proxy_async(); }
  uint32_t peer_address(uint32_t address, uint32_t block) const override {
    PMF_HERE;
    return emulator::peer_address(address, block);
  }
  void cluster_arrive(int line) const override {
    PMF_HERE;
    machine.aligned_line = line;
    emulator::cluster_arrive();
  }
  void cluster_wait(int line) const override {
    PMF_HERE;
    machine.aligned_line = line;
    emulator::cluster_wait();
  }
  void copy_box(uint32_t to, const void* map, uint32_t barrier, Word4 place,
                uint32_t blocks) const override {
    PMF_HERE;
    emulator::copy_box(to, map, barrier, place, blocks);
  }
  void prefetch(uint64_t address, uint32_t bytes) const override {
    PMF_HERE;
    emulator::prefetch(address, bytes);
  }
  void wgmma(int line, const Product& product, float* sums, const uint32_t* a) const override {
    PMF_HERE;
    machine.aligned_line = line;
    emulator::wgmma(product, sums, a, false);
  }
  void wgmma_fence(int line) const override {
    PMF_HERE;
    machine.aligned_line = line;
    emulator::wgmma_fence();
  }
  void wgmma_commit(int line) const override {
    PMF_HERE;
    machine.aligned_line = line;
    emulator::wgmma_commit();
  }
  void wgmma_wait(int line, int pending) const override {
    PMF_HERE;
    machine.aligned_line = line;
    emulator::wgmma_wait(pending);
  }
  float waited_for(float x) const override {
    PMF_HERE;
    return emulator::waited_for(x);
  }
  bool elect_one(uint32_t lanes) const override {
    PMF_HERE;
    whole_warp(lanes);
    return emulator::elect_one();
  }
  void set_registers(int line, int count, bool more) const override {
    PMF_HERE;
    machine.aligned_line = line;
    emulator::set_registers(count, more);
  }

  uint16_t to_half(float x) const override { return Half(x).bits; }
  float from_half(uint16_t bits) const override { return Half::from_bits(bits); }
  void trap() const override {
    PMF_HERE;
    machine.fail("a trap instruction");
  }
};

const Machinery machinery;

Translator translator = nullptr;
std::unordered_map<const void*, Translation> translations;

struct Call {
  void (*run)(const ptx::Device& device, const unsigned char* parameters);
  std::vector<unsigned char> parameters;
};
Call call;

void thread(const void* parameters) {
  call.run(machinery, static_cast<const unsigned char*>(parameters));
}

}  // namespace

bool translating() { return translator != nullptr; }

const char* run_translated(const void* kernel, Launch launch, const Parameter* parameters,
                           int count) {
  call.parameters.clear();
  std::vector<int64_t> bytes;
  for (const Parameter* p = parameters; p < parameters + count; ++p) {
    const size_t at = (call.parameters.size() + p->alignment - 1) / p->alignment * p->alignment;
    call.parameters.resize(at + p->bytes, kPadding);
    std::memcpy(&call.parameters[at], p->address, p->bytes);
    bytes.push_back(static_cast<int64_t>(p->bytes));
  }
  const auto [place, unknown] = translations.try_emplace(kernel);
  Translation& found = place->second;
  if (unknown) translator(kernel, bytes.data(), count, &found);
  if (found.run == nullptr) return machine.refuse(found.problem);
  call.run = found.run;
  launch.thread = &thread;
  launch.call = call.parameters.data();
  launch.call_bytes = call.parameters.size();
  launch.translated = true;
  return run(launch);
}

// Null restores the kernels compiled by g++.
extern "C" __attribute__((visibility("default"))) void pmf_emulator_translate(Translator from) {
  translator = from;
  translations.clear();
}

}  // namespace pmf::emulator
