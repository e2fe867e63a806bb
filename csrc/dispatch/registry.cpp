// SPDX-License-Identifier: BSD-3-Clause
#include "dispatch/registry.h"

namespace fa {

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace fa
