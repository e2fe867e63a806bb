// SPDX-License-Identifier: BSD-3-Clause
// Errors. The library throws and never prints, exits or aborts. A message is one sentence for the
// user and carries no source path; its prefix names the Python exception that it becomes.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fa {

enum class ErrorKind { kValue, kType, kNotImplemented, kRuntime, kOutOfMemory };

constexpr const char* name_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kValue:
      return "ValueError";
    case ErrorKind::kType:
      return "TypeError";
    case ErrorKind::kNotImplemented:
      return "NotImplementedError";
    case ErrorKind::kRuntime:
      return "RuntimeError";
    case ErrorKind::kOutOfMemory:
      return "OutOfMemoryError";
  }
  return "";
}

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& sentence)
      : std::runtime_error(std::string(name_of(kind)) + ": " + sentence),
        kind_(kind),
        sentence_(sentence) {}

  ErrorKind kind() const { return kind_; }
  const std::string& sentence() const { return sentence_; }

 private:
  ErrorKind kind_;
  std::string sentence_;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <typename... Parts>
void check(bool condition, ErrorKind kind, const Parts&... sentence) {
  if (!condition) [[unlikely]] {
    throw Error(kind, concat(sentence...));
  }
}

}  // namespace fa
