#include "place.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <sstream>

namespace pmf::emulator {

std::string describe_place(const void* address) {
  Dl_info info = {};
  if (address == nullptr || dladdr(address, &info) == 0) return "place unknown";
  // This is the return address, which lies after the call.
  const auto offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  std::ostringstream command, result;
  command << "addr2line -i -s -e '" << info.dli_fname << "' 0x" << std::hex << offset
          << " 2>/dev/null";
  if (FILE* lines = popen(command.str().c_str(), "r")) {
    constexpr int kMostLines = 6;
    char line[256];
    for (int i = 0; i < kMostLines && std::fgets(line, sizeof(line), lines) != nullptr; ++i) {
      std::string text(line);
      text = text.substr(0, text.find_first_of(" \n"));
      if (text[0] != '?') result << (i ? " < " : "at ") << text;
    }
    pclose(lines);
  }
  if (result.str().empty()) result << "at offset 0x" << std::hex << offset;
  return result.str();
}

}  // namespace pmf::emulator
