// A dry run: launchers choose kernels and plans as usual, but for a device that is described, not
// queried, and launches are recorded, not made. So plans can be inspected without a GPU and cannot
// differ from what is launched.
#pragma once

#include "pmf/introspection.h"

namespace pmf::cuda {

class DryRun {
 public:
  DryRun(const Device& device, NoteLaunch note, void* context)
      : device_(device), note_(note), context_(context) {}

  const Device& device() const { return device_; }

  // Describes the next launch: its tile, and the number of blocks per SM that the launcher expects.
  void plan(int rows, int columns, int blocks_per_processor) {
    next_.tile_rows = rows;
    next_.tile_columns = columns;
    next_.blocks_per_processor = blocks_per_processor;
  }

  void launch(const void* kernel, int64_t blocks, int64_t threads, int64_t shared_bytes) {
    next_.kernel = kernel;
    next_.blocks = blocks;
    next_.threads = threads;
    next_.shared_bytes = shared_bytes;
    note_(context_, next_);
    next_ = {};
  }

 private:
  Device device_;
  NoteLaunch note_;
  void* context_;
  KernelLaunch next_;
};

// The dry run of this thread; null: launches are real.
inline thread_local DryRun* dry_run = nullptr;

// Called by launchers: see DryRun::plan.
inline void plan_next_launch(int rows, int columns, int blocks_per_processor) {
  if (dry_run != nullptr) dry_run->plan(rows, columns, blocks_per_processor);
}

}  // namespace pmf::cuda
