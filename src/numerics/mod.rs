//! The meaning of one scalar or one code, shared by the reference and the kernels' twins.

mod activate;
mod float;
mod fp4;
mod fp8;
mod int;
mod quantize;
mod score;

pub use activate::{activate, activate_parts, gelu_erf};
pub use float::{decode_bf16, decode_f16, round_to};
pub use fp4::{Mxfp4Scale, decode_e2m1, encode_e2m1, mxfp4_scale};
pub use fp8::{ceil_e8m0, decode_e4m3, decode_e5m2, decode_e8m0, e4m3_values, encode_e4m3};
pub use int::{decode, q4_k_scale, q6_k_scale};
pub use quantize::{SpanScale, decode_activation, encode_activation, largest_magnitude, scale_floor};
pub use score::{denominator, log_sigmoid, order_key, sigmoid, softplus, sqrt_softplus};
