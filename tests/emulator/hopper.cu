// Single Hopper instructions on operands supplied by a test, and a tiny kernel that loads,
// multiplies and stores, correct or with one fault.
#include <iterator>

#include "cuda/common/hopper.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_map.cuh"

#define PMF_DOOR extern "C" __attribute__((visibility("default")))

namespace pmf::planted {
namespace {

using namespace pmf::cuda;

constexpr int kGroup = 128;  // threads
__device__ inline int thread() { return static_cast<int>(threadIdx.x); }

// ---- one product --------------------------------------------------------------------------------

struct Factors {
  const uint16_t* image;  // of shared memory, from its beginning
  int elements;
  uint64_t a, b;         // descriptors whose addresses count from there
  const uint32_t* rows;  // [128][4]: A in registers
  float* sums;           // [128][4 tiles]
  bool adds;
};

template <typename T, int kTiles, bool kInRegisters, bool kTransposed = kInRegisters>
__global__ void product_probe(Factors p) {
  auto* const shared = reinterpret_cast<uint16_t*>(swizzled_shared());
  for (int i = thread(); i < p.elements; i += kGroup) shared[i] = p.image[i];
  fence_proxy_async();
  __syncthreads();
  float d[kTiles][4];
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = p.rows[4 * thread() + i];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) d[j][e] = p.sums[4 * (kTiles * thread() + j) + e];
  }
  const uint64_t start = shared_address(shared) >> 4;
  hold(d);
  hold(a);
  wgmma_fence();
  if constexpr (kInRegisters) {
    wgmma<T, kTransposed>(d, a, p.b + start, p.adds);
  } else {
    wgmma<T, kTransposed>(d, p.a + start, p.b + start, p.adds);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(d);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) p.sums[4 * (kTiles * thread() + j) + e] = d[j][e];
  }
}

template <typename T>
void (*product_of(int tiles, bool in_registers, bool transposed))(Factors) {
  switch (tiles) {
    case 2:
      return &product_probe<T, 2, true>;
    case 4:
      return in_registers ? &product_probe<T, 4, true> : &product_probe<T, 4, false>;
    case 6:
      return in_registers ? &product_probe<T, 6, true, false> : &product_probe<T, 6, false>;
    case 8:
      return &product_probe<T, 8, true>;
    case 10:
      return &product_probe<T, 10, true>;
    case 12:
      return &product_probe<T, 12, false>;
    case 16:
      return &product_probe<T, 16, true>;
    default:
      return transposed ? &product_probe<T, 32, false, true> : &product_probe<T, 32, false>;
  }
}

// ---- one copy -----------------------------------------------------------------------------------

struct BoxProblem {
  TensorMap map;
  int place[4];
  int bytes;        // of the box
  uint16_t* image;  // of shared memory
  int* elected;     // [4]: lanes that each warp has elected
};

__global__ void box_probe(const __grid_constant__ BoxProblem p) {
  unsigned char* const shared = swizzled_shared();
  const uint32_t barrier = shared_address(shared + p.bytes);
  if (thread() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  const bool elected = elect_one();
  if (elected) p.elected[thread() / kWarpThreads] = 1;
  if (elected && thread() < kWarpThreads) {
    mbarrier_expect(barrier, uint32_t(p.bytes));
    copy_box(shared_address(shared), &p.map, barrier, p.place[0], p.place[1], p.place[2],
             p.place[3]);
  }
  mbarrier_wait(barrier, 0);
  for (int i = thread(); i < p.bytes / 2; i += kGroup) {
    p.image[i] = reinterpret_cast<const uint16_t*>(shared)[i];
  }
}

__global__ void prefetch_probe(uintptr_t address, uint32_t bytes) {
  if (thread() == 0) prefetch_to_l2(address, bytes);
}

// ---- load, multiply, store ----------------------------------------------------------------------

enum Fault {
  kNone,
  kSumsRead,
  kSumsWritten,
  kFactorWritten,
  kReleasedEarly,
  kWrongParity,
  kEarlyParity,
  kBytesMissing,
  kArrivalMissing,
  kArrivalTooMany,
  kNotInitialised,
  kNoInitFence,
  kNoProxyFence,
  kNoProductFence,
  kDescriptorOff,
  kNotWaited,
  kCopyNotWaited,
  kTooManyRegisters,
};

constexpr int kRows = 64, kKeys = 48, kWidth = 64, kRounds = 4, kSlots = 2;
constexpr int kABytes = 2 * kRows * kWidth, kBBytes = 2 * kKeys * kWidth;
constexpr int kSlotBytes = kABytes + 8192;  // B starts at a multiple of 1024
constexpr int64_t kSharedBytes = kSlots * kSlotBytes + 256;

struct Tiles {
  TensorMap a, b;  // [kRounds 64][64] and [kRounds 48][64]
  float* output;   // [2][128][24]: sums of all rounds' products, twice
};

// A producer warp fills two slots in turn, and two warpgroups multiply their contents.
template <Fault kFault>
__global__ void __launch_bounds__(3 * kGroup, 1) tiles_kernel(const __grid_constant__ Tiles p) {
  unsigned char* const shared = swizzled_shared();
  const auto slot_at = [&](int slot) {
    return shared_address(shared) + uint32_t(slot * kSlotBytes);
  };
  const auto full = [&](int slot) { return slot_at(kSlots) + 16 * uint32_t(slot); };
  const auto empty = [&](int slot) { return full(slot) + 8; };
  if (thread() == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (kFault != kNotInitialised) mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), kFault == kArrivalMissing ? 9 : 8);
    }
    if (kFault != kNoInitFence) mbarrier_init_fence();
  }
  if (kFault == kNoProxyFence) {  // a tile that the producer does not fill
    for (int i = thread(); i < kABytes / 2; i += 3 * kGroup) {
      reinterpret_cast<uint16_t*>(shared)[i] = 0;
    }
  }
  __syncthreads();
  if (thread() < kGroup) {
    if (kFault != kTooManyRegisters) registers_down_to<24>();
    if (thread() / kWarpThreads == 0 && elect_one()) {
      for (int i = 0; i < kRounds; ++i) {
        const int slot = i % kSlots;
        const uint32_t parity = uint32_t(i / kSlots & 1);
        mbarrier_wait(empty(slot), parity ^ 1);
        const int more = kFault == kBytesMissing ? 16 : 0;
        const bool skips = kFault == kNoProxyFence && i == 0;
        mbarrier_expect(full(slot), (skips ? 0 : kABytes) + kBBytes + more);
        if (!skips) copy_box(slot_at(slot), &p.a, full(slot), 0, i * kRows, 0, 0);
        copy_box(slot_at(slot) + kABytes, &p.b, full(slot), 0, i * kKeys, 0, 0);
        if (kFault == kArrivalTooMany && i == 1) {
          mbarrier_arrive(full(slot));
        }
      }
      if (kFault == kCopyNotWaited) {
        mbarrier_wait(empty(0), 1);
        mbarrier_expect(full(0), kBBytes);
        copy_box(slot_at(0) + kABytes, &p.b, full(0), 0, 0, 0, 0);
      }
    }
    return;
  }
  registers_up_to<240>();
  float d[6][4] = {};
  uint32_t factor[4] = {};
  float e[2][4] = {};
  for (int i = 0; i < kRounds; ++i) {
    const int slot = i % kSlots;
    const uint32_t parity = uint32_t(i / kSlots & 1);
    mbarrier_wait(full(slot), kFault == kEarlyParity ? parity ^ 1 : parity);
    if (kFault == kWrongParity && i == kRounds - 1) mbarrier_wait(full(slot), parity ^ 1);
    hold(d);
    if (kFault != kNoProductFence) wgmma_fence();
    const uint32_t a = slot_at(slot), b = a + kABytes + (kFault == kDescriptorOff ? 128 : 0);
    for (int k = 0; k < kWidth / 16; ++k) {
      wgmma<__nv_bfloat16, false>(d, matrix_descriptor(a + 32 * k, 16, 1024, Swizzle::bytes128),
                                  matrix_descriptor(b + 32 * k, 16, 1024, Swizzle::bytes128), true);
    }
    if (kFault == kFactorWritten) {
      hold(factor);
      wgmma<__nv_bfloat16, true>(e, factor, matrix_descriptor(a, 0, 256, Swizzle::bytes32), true);
      factor[1] = 1;
    }
    if (kFault != kNotWaited) wgmma_commit();
    if (kFault == kSumsRead) p.output[24 * (thread() - kGroup)] = d[1][1];
    if (kFault == kSumsWritten) d[2][1] += 1.0f;
    if (kFault == kReleasedEarly && thread() % kWarpThreads == 0) mbarrier_arrive(empty(slot));
    if (kFault != kNotWaited || i == 0) wgmma_wait<0>();
    hold(d);
    if (kFault != kReleasedEarly && thread() % kWarpThreads == 0) mbarrier_arrive(empty(slot));
  }
  for (int j = 0; j < 6; ++j) {
    for (int i = 0; i < 4; ++i) {
      if (kFault == kSumsRead && j + i == 0) continue;
      p.output[24 * (thread() - kGroup) + 4 * j + i] = d[j][i] + e[0][0];
    }
  }
}

// ---- two blocks that copy for each other --------------------------------------------------------

enum ClusterFault {
  kNoClusterFault,
  kPeerNotAsked,
  kPeerForgotten,
  kNoFirstSync,
  kNoLastSync,
  kNoClusterArrival,
};

// In each block of a cluster, one warp copies half of every slot, to both blocks, and one adds up
// its elements.
template <ClusterFault kFault>
__global__ void cluster_kernel(const __grid_constant__ Tiles p) {
  const auto* const shared = swizzled_shared();
  const uint32_t rank = blockIdx.x % 2, start = shared_address(shared);
  const auto full = [&](int slot) { return start + kSlots * 2 * kABytes + 16 * uint32_t(slot); };
  const auto empty = [&](int slot) { return full(slot) + 8; };
  if (thread() == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), kFault == kPeerNotAsked ? 1 : 2);
    }
    mbarrier_init_fence();
  }
  if (kFault == kNoFirstSync) {
    __syncthreads();
  } else if (kFault != kNoClusterArrival || rank == 0) {
    cluster_sync();
  }
  const int warp = thread() / kWarpThreads, lane = thread() % kWarpThreads;
  float sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    const int slot = i % kSlots;
    const uint32_t parity = uint32_t(i / kSlots & 1);
    if (warp == 0 && elect_one()) {
      mbarrier_wait(empty(slot), parity ^ 1);
      mbarrier_expect(full(slot), 2 * kABytes);
      const uint32_t to = start + uint32_t(2 * slot + rank) * kABytes;
      const int row = (i + int(rank)) % kRounds * kRows;
      if (kFault == kPeerForgotten && rank == 1) {
        copy_box(to, &p.a, full(slot), 0, row, 0, 0);
      } else {
        copy_box_to_blocks(to, &p.a, full(slot), 0, row, 0, 0, 3);
      }
    }
    if (warp == 0) continue;
    mbarrier_wait(full(slot), parity);
    const auto* const elements =
        reinterpret_cast<const __nv_bfloat16*>(shared + slot * 2 * kABytes);
    for (int e = lane; e < kABytes; e += kWarpThreads) sum += __bfloat162float(elements[e]);
    __syncwarp();
    if (lane < 2 && (kFault != kPeerNotAsked || uint32_t(lane) == rank)) {
      mbarrier_arrive_in_cluster(peer_address(empty(slot), uint32_t(lane)));
    }
  }
  if (warp == 1) p.output[rank * kWarpThreads + uint32_t(lane)] = sum;
  __syncwarp();
  if (kFault != kNoLastSync && kFault != kNoClusterArrival) cluster_sync();
}

struct PlantedFault {
  const char* name;
  void (*kernel)(Tiles);
};
#define PMF_FAULT(name, fault) \
  PlantedFault { #name, &tiles_kernel<fault> }
#define PMF_CLUSTER_FAULT(name, fault) \
  PlantedFault { #name, &cluster_kernel<fault> }

const PlantedFault kAllOfClusters[] = {
    PMF_CLUSTER_FAULT(none, kNoClusterFault),
    PMF_CLUSTER_FAULT(slot_filled_before_the_peer_has_read_it, kPeerNotAsked),
    PMF_CLUSTER_FAULT(copy_that_the_peer_does_not_get, kPeerForgotten),
    PMF_CLUSTER_FAULT(no_barrier_before_the_peers_are_used, kNoFirstSync),
    PMF_CLUSTER_FAULT(block_that_ends_too_soon, kNoLastSync),
    PMF_CLUSTER_FAULT(no_arrival_at_the_barrier_of_the_cluster, kNoClusterArrival),
};

const PlantedFault kAll[] = {
    PMF_FAULT(none, kNone),
    PMF_FAULT(sums_read_before_the_wait, kSumsRead),
    PMF_FAULT(sums_written_before_the_wait, kSumsWritten),
    PMF_FAULT(factor_written_before_the_wait, kFactorWritten),
    PMF_FAULT(slot_released_before_the_wait, kReleasedEarly),
    PMF_FAULT(wrong_parity, kWrongParity),
    PMF_FAULT(parity_of_the_phase_before, kEarlyParity),
    PMF_FAULT(bytes_that_never_come, kBytesMissing),
    PMF_FAULT(arrival_missing, kArrivalMissing),
    PMF_FAULT(arrival_too_many, kArrivalTooMany),
    PMF_FAULT(barrier_not_initialised, kNotInitialised),
    PMF_FAULT(no_fence_of_barriers, kNoInitFence),
    PMF_FAULT(no_fence_between_proxies, kNoProxyFence),
    PMF_FAULT(no_fence_before_products, kNoProductFence),
    PMF_FAULT(descriptor_off_its_alignment, kDescriptorOff),
    PMF_FAULT(products_never_waited_for, kNotWaited),
    PMF_FAULT(copy_never_waited_for, kCopyNotWaited),
    PMF_FAULT(too_many_registers, kTooManyRegisters),
};

const char* sentence(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

TensorMap map_of(const uint16_t* data, uint64_t rows, int box_rows) {
  TensorMap map;
  constexpr uint64_t kRow = 2 * kWidth;
  encode_tensor_map(&map, data, {kWidth, rows, 1, 1}, {kRow, kRow * rows, kRow * rows}, box_rows,
                    Swizzle::bytes128);
  return map;
}

}  // namespace

PMF_DOOR const char* pmf_hopper_product(bool half, int tiles, bool transposed,
                                        const uint16_t* image, int elements, uint64_t a, uint64_t b,
                                        const uint32_t* rows, float* sums, bool adds) {
  const bool in_registers = a == 0;
  const auto kernel = half ? product_of<__half>(tiles, in_registers, transposed)
                           : product_of<__nv_bfloat16>(tiles, in_registers, transposed);
  return sentence(launch(kernel, 1, kGroup, 2 * int64_t{elements}, nullptr,
                         Factors{image, elements, a, b, rows, sums, adds}));
}

// Copies the box at `place` (innermost first) of a tensor [batch][head][row][column], with the
// swizzle of `width` bytes.
PMF_DOOR const char* pmf_hopper_box(const uint16_t* tensor, const uint64_t* sizes,
                                    const uint64_t* strides, int rows, int width, const int* place,
                                    uint16_t* image, int* elected) {
  BoxProblem p = {{}, {place[0], place[1], place[2], place[3]}, rows * width, image, elected};
  const Swizzle swizzle = width == 128  ? Swizzle::bytes128
                          : width == 64 ? Swizzle::bytes64
                                        : Swizzle::bytes32;
  if (!encode_tensor_map(&p.map, tensor, {sizes[0], sizes[1], sizes[2], sizes[3]},
                         {strides[0], strides[1], strides[2]}, rows, swizzle)) {
    return "no such tensor map";
  }
  return sentence(launch(&box_probe, 1, kGroup, p.bytes + 8, nullptr, p));
}

PMF_DOOR const char* pmf_hopper_prefetch(const char* tensor, int offset, unsigned bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor) + uintptr_t(offset);
  return sentence(launch(&prefetch_probe, 1, kGroup, 0, nullptr, address, bytes));
}

PMF_DOOR const char* pmf_hopper_fault_name(int i) {
  return i < static_cast<int>(std::size(kAll)) ? kAll[i].name : nullptr;
}

PMF_DOOR const char* pmf_hopper_cluster_fault_name(int i) {
  return i < static_cast<int>(std::size(kAllOfClusters)) ? kAllOfClusters[i].name : nullptr;
}

PMF_DOOR const char* pmf_hopper_cluster_fault(int i, const uint16_t* a, float* output) {
  const TensorMap map = map_of(a, kRounds * kRows, kRows);
  return sentence(launch_clusters(kAllOfClusters[i].kernel, 2, 2, 2 * kWarpThreads,
                                  kSlots * 2 * kABytes + 256, nullptr, Tiles{map, map, output}));
}

PMF_DOOR const char* pmf_hopper_fault(int i, const uint16_t* a, const uint16_t* b, float* output) {
  const Tiles tiles = {map_of(a, kRounds * kRows, kRows), map_of(b, kRounds * kKeys, kKeys),
                       output};
  return sentence(launch(kAll[i].kernel, 1, 3 * kGroup, kSharedBytes, nullptr, tiles));
}

}  // namespace pmf::planted
