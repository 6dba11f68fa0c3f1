// What the CUDA library offers torch. No autograd and no shapes here: `urlvr_fast/ops` defines the ops that users see.
#include <torch/csrc/stable/library.h>

#include "../schema.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(urlvr_fast, m) {
  m.def("cuda_statistics(" ROWS_SCHEMA ", Tensor(a!) out) -> ()");
  m.def("cuda_gradient(" ROWS_SCHEMA ", Tensor stats, Tensor upstream, int given, Tensor(a!) out, Tensor(b!)? bias_grad) -> ()");
  m.def("cuda_policy(" ROWS_SCHEMA
        ", Tensor loss, int present, int loss_kind, int kl_kind, int correction, float[] numbers, Tensor(a!) stats, Tensor(b!) out, "
        "Tensor(c!)? row_scale) -> ()");
  m.def("cuda_loss_rows(" LOSS_ROWS_SCHEMA ") -> ()");
  m.def("cuda_join(" JOIN_SCHEMA ") -> ()");
  m.def("cuda_objective(" OBJECTIVE_SCHEMA ") -> ()");
  m.def("cuda_scale(Tensor(a!) gradient, Tensor factor, Tensor? row_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(urlvr_fast, CUDA, m) {
  m.impl("cuda_statistics", TORCH_BOX(&urlvr::cuda::statistics));
  m.impl("cuda_gradient", TORCH_BOX(&urlvr::cuda::gradient));
  m.impl("cuda_policy", TORCH_BOX(&urlvr::cuda::policy));
  m.impl("cuda_loss_rows", TORCH_BOX(&urlvr::cuda::loss_rows));
  m.impl("cuda_join", TORCH_BOX(&urlvr::cuda::join));
  m.impl("cuda_objective", TORCH_BOX(&urlvr::cuda::objective));
  m.impl("cuda_scale", TORCH_BOX(&urlvr::cuda::scale));
}
