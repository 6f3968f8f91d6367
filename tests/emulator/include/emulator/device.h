// The devices that the emulator reports.
#pragma once

namespace pmf::emulator {

struct Capability {
  int major = 9, minor = 0;
};

constexpr int kDevices = 32, kRuntimeVersion = 13000;
inline Capability capabilities[kDevices];
inline int driver_version = kRuntimeVersion;

const char* last_problem();

}  // namespace pmf::emulator
