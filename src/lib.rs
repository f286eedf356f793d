//! Mixture-of-Experts layers on any GPU, proved field by field against one reference.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable
    )
)]

pub mod backend;
pub mod checkpoint;
pub mod error;
pub mod families;
#[cfg(feature = "cli")]
pub mod host;
pub mod kernels;
pub mod numerics;
pub mod plan;
pub mod reference;
pub mod schedule;
pub mod spec;
mod support;
pub mod weights;

#[cfg(feature = "wgpu")]
pub use ::wgpu;
pub use backend::cpu::Cpu;
#[cfg(feature = "wgpu")]
pub use backend::wgpu::Wgpu;
pub use checkpoint::Checkpoint;
pub use error::{Error, Result, Unsupported};
pub use plan::{Backend, Bound, Io, Plan, Scratch, ScratchLayout, Tokens, supports};
pub use schedule::{Options, Schedule};
pub use spec::MoeSpec;
pub use support::Scope;
pub use weights::{Matrix, MlpWeights, MoeWeights, RouterWeights, Tensor};
