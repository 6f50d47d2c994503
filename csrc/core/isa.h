// Which instruction set the kernels run on.
#pragma once

#include <string>
#include <vector>

#include "core/kernel_table.h"

namespace outdraft {

// Names of the sets that this build and this CPU have, best first; "portable" is always last.
std::vector<std::string> available_isas();

// The kernels in use: those of the best set until set_isa says otherwise.
const KernelTable& kernels();
std::string current_isa();

// Take another set from now on. Programs recorded before keep theirs.
// Throws std::invalid_argument when the name is not among available_isas().
void set_isa(const std::string& name);

// One sentence: which set runs and why.
std::string isa_report();

}  // namespace outdraft
