// What the compiled library offers torch. No autograd and no shapes here: `urlvr_fast/ops` defines the ops that users see.
#include <torch/csrc/stable/library.h>

#include "cpu/instruction_set.h"
#include "cpu/ops.h"
#include "schema.h"

STABLE_TORCH_LIBRARY_FRAGMENT(urlvr_fast, m) {
  m.def("cpp_statistics(" ROWS_SCHEMA ", Tensor(a!) out) -> ()");
  m.def("cpp_gradient(" ROWS_SCHEMA ", Tensor stats, Tensor upstream, int given, Tensor(a!) out, Tensor(b!)? bias_grad) -> ()");
  m.def("cpp_policy(" ROWS_SCHEMA
        ", Tensor loss, int present, int kind, int kl, int correction, float[] numbers, Tensor(a!) stats, Tensor(b!) out, "
        "Tensor(c!)? row_scale) -> ()");
  m.def("cpp_loss_rows(" LOSS_ROWS_SCHEMA ") -> ()");
  m.def("cpp_join(" JOIN_SCHEMA ") -> ()");
  m.def("cpp_objective(" OBJECTIVE_SCHEMA ") -> ()");
  m.def("cpp_advantages(Tensor rewards, Tensor group_ids, Tensor? mask, str scale, str baseline, float eps, Tensor(a!) out) -> int");
  m.def("cpp_instruction_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(urlvr_fast, CPU, m) {
  m.impl("cpp_statistics", TORCH_BOX(&urlvr::cpu::statistics));
  m.impl("cpp_gradient", TORCH_BOX(&urlvr::cpu::gradient));
  m.impl("cpp_policy", TORCH_BOX(&urlvr::cpu::policy));
  m.impl("cpp_loss_rows", TORCH_BOX(&urlvr::cpu::loss_rows));
  m.impl("cpp_join", TORCH_BOX(&urlvr::cpu::join));
  m.impl("cpp_objective", TORCH_BOX(&urlvr::cpu::objective));
  m.impl("cpp_advantages", TORCH_BOX(&urlvr::cpu::advantages));
}

STABLE_TORCH_LIBRARY_IMPL(urlvr_fast, CompositeExplicitAutograd, m) {
  m.impl("cpp_instruction_set", TORCH_BOX(&urlvr::cpu::use_instruction_set));
}
