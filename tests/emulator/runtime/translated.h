// Kernels translated from PTX, run in the place of those that g++ compiled.
#pragma once

#include <cstdint>

#include "emulator/ptx.h"

namespace pmf::emulator {

// What a test's translator answers (tests/helpers/ptx/backend.py).
struct Translation {
  void (*run)(const ptx::Device& device, const unsigned char* parameters) = nullptr;
  char problem[1024] = "";
};

// `kernel` is the host's function; `bytes`, of `count` numbers, are the sizes of its parameters.
using Translator = void (*)(const void* kernel, const int64_t* bytes, int count,
                            Translation* found);

}  // namespace pmf::emulator
