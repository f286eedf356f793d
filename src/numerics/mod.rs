//! The meaning of one scalar or one code, shared by the reference and the kernels' twins.

mod activate;
mod float;
mod fp8;
mod score;

pub use activate::{activate, activate_parts, gelu_erf};
pub use float::{decode_bf16, decode_f16, round_to};
pub use fp8::{decode_e4m3, decode_e8m0, e4m3_values};
pub use score::{denominator, log_sigmoid, order_key, sigmoid, softplus, sqrt_softplus};
