// SPDX-License-Identifier: BSD-3-Clause
// What a C++ test needs: FA_EXPECT in its body, and `return fa::test::report("name");` at its end.
// Host only; a CUDA test copies its results to the host and expects there.
#pragma once

#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>

namespace fa::test {

inline constexpr int kPassed = 0;
inline constexpr int kFailed = 1;
inline constexpr int kSkipped = 77;  // CTest's SKIP_RETURN_CODE

struct Counts {
  int64_t expectations = 0;
  int64_t failures = 0;
};

inline Counts& counts() {
  static Counts instance;
  return instance;
}

// The first failures tell what is wrong; the rest are only counted.
inline constexpr int64_t kMostPrinted = 20;

template <typename... Values>
void fail(const char* file, int line, const char* expression, const Values&... values) {
  if (++counts().failures > kMostPrinted) {
    return;
  }
  std::ostringstream stream;
  ((stream << ' ' << values), ...);
  std::fprintf(stderr, "%s:%d: expected %s;%s\n", file, line, expression, stream.str().c_str());
}

// Prints a sentence and gives main its exit status.
inline int report(const char* name) {
  const auto expectations = static_cast<long long>(counts().expectations);
  const auto failures = static_cast<long long>(counts().failures);
  if (expectations == 0) {
    std::printf("%s: failed, for it expected nothing.\n", name);
    return kFailed;
  }
  if (failures > 0) {
    std::printf("%s: %lld of %lld expectations failed.\n", name, failures, expectations);
    return kFailed;
  }
  std::printf("%s: all %lld expectations hold.\n", name, expectations);
  return kPassed;
}

inline int skip(const char* name, const std::string& reason) {
  std::printf("%s: skipped, because %s.\n", name, reason.c_str());
  return kSkipped;
}

}  // namespace fa::test

// FA_EXPECT(condition, "seqlen_q", seqlen_q, ...): the values are printed where it fails.
#define FA_EXPECT(condition, ...)                                                  \
  do {                                                                             \
    ++::fa::test::counts().expectations;                                           \
    if (!(condition)) {                                                            \
      ::fa::test::fail(__FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__); \
    }                                                                              \
  } while (false)

#define FA_EXPECT_EQ(actual, expected, ...)                                            \
  do {                                                                                 \
    ++::fa::test::counts().expectations;                                               \
    const auto& fa_actual = (actual);                                                  \
    const auto& fa_expected = (expected);                                              \
    if (!(fa_actual == fa_expected)) {                                                 \
      ::fa::test::fail(__FILE__, __LINE__, #actual " == " #expected, "got", fa_actual, \
                       "instead of", fa_expected __VA_OPT__(, ) __VA_ARGS__);          \
    }                                                                                  \
  } while (false)
