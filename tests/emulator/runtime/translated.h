// Kernels translated from PTX, run in place of those compiled by g++.
#pragma once

#include <cstdint>

#include "emulator/ptx.h"

namespace pmf::emulator {

// The result of a test's translator (tests/helpers/ptx/backend.py).
struct Translation {
  void (*run)(const ptx::Device& device, const unsigned char* parameters) = nullptr;
  char problem[1024] = "";
};

// `kernel` is the host function; `bytes` are the sizes of its `count` parameters.
using Translator = void (*)(const void* kernel, const int64_t* bytes, int count,
                            Translation* found);

}  // namespace pmf::emulator
