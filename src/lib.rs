//! Mixture-of-Experts layers on GPUs, proved field by field against one reference.
//!
//! A [`MoeSpec`] says what a layer computes. [`schedule::lower`] turns it into a [`Schedule`]: kernels,
//! constants, buffers and grids as plain data. [`Plan::new`] makes a schedule ready on a [`Backend`]:
//! it compiles, packs and uploads. [`Plan::bind`] ties the plan to the caller's buffers, and
//! [`Bound::record`] writes the dispatches into the caller's encoder. It submits nothing and waits for
//! nothing. [`mod@reference`] computes the same layer in plain loops, reads only spec and weights, and judges.
//!
//! What a backend lacks is refused with the name of the field when the plan is made ([`Unsupported`]),
//! never dropped. [`supports`] gives the same answer without planning.
//!
//! [`Checkpoint`] and [`families`] read a spec and its weights from `config.json` and safetensors or GGUF.
//! A host whose own kernels do the rest plans the routing alone, [`Plan::routing`], or another stage, [`Plan::stage`].
//!
//! The backends are [`Cpu`], which runs each kernel's twin in Rust, `Wgpu` (feature `wgpu`), which runs WGSL on a device
//! of the host program, and `Cuda` (feature `cuda`), which runs on a host's streams and device memory.
//!
//! # Example
//!
//! One layer of a checkpoint on the CPU backend, compared with the reference. On a GPU only the buffers,
//! the encoder and the submission are others: see `examples/embed.rs`.
//!
//! ```
//! use std::path::Path;
//!
//! use moewe::backend::cpu::{CpuBuffer, CpuEncoder};
//! use moewe::families::{Request, resolve};
//! use moewe::reference::{self, Inputs};
//! use moewe::spec::{ActivationQuant, FloatType};
//! use moewe::{Backend, Checkpoint, Cpu, Io, Options, Plan, Scratch, Tokens};
//!
//! # fn main() -> moewe::Result<()> {
//! let checkpoint = Checkpoint::open(Path::new("tests/golden/mixtral"))?;
//! let request =
//!     Request { layer: None, input: FloatType::F32, output: FloatType::F32, activations: ActivationQuant::None };
//! let resolved = resolve(&checkpoint, &request)?;
//! let (spec, weights) = (&resolved.spec, resolved.weights(&checkpoint)?);
//!
//! // Once a layer.
//! let (backend, tokens) = (Cpu::new(), 3);
//! let plan = Plan::new(backend, spec, &weights, tokens, &Options::AUTO)?;
//! let scratch = Scratch::new(&backend, &plan.scratch_layout())?;
//!
//! // Once a set of buffers.
//! let x: Vec<f32> = (0..tokens * spec.hidden_size).map(|at| (at as f32 * 0.37).sin()).collect();
//! let hidden_states = CpuBuffer::from_words(x.iter().map(|value| value.to_bits()).collect());
//! let output = backend.create_buffer("output", 4 * x.len() as u64, false)?;
//! let io = Io { output: Some(&output), ..Io::of(&hidden_states) };
//! let bound = plan.bind(&io, &scratch)?;
//!
//! // Each call. The CPU backend runs what it records.
//! bound.record(&mut CpuEncoder, &Tokens::Host(tokens))?;
//!
//! let want = reference::layer(spec, &weights, Inputs::of(&x))?;
//! for (got, want) in output.to_words().into_iter().map(f32::from_bits).zip(want.output) {
//!     assert!((got - want).abs() < 1e-5);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - `wgpu` (default): the `Wgpu` backend.
//! - `cuda`: the `Cuda` backend. Builds anywhere; the driver and NVRTC are found at run time.
//! - `cli` (default): the tool `moewe` and the module `host`, the only place of the library that waits
//!   for a device. Programs with a device of their own use `default-features = false`.

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
#[cfg(feature = "cli")]
pub mod conformance;
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
#[cfg(feature = "cuda")]
pub use backend::cuda::Cuda;
#[cfg(feature = "wgpu")]
pub use backend::wgpu::Wgpu;
pub use checkpoint::Checkpoint;
pub use error::{Error, Result, Unsupported};
pub use plan::{Backend, Bound, Io, Plan, Scratch, ScratchLayout, Slice, Slices, Tokens, supports};
pub use schedule::{Cut, Cuts, Options, Pace, Rates, Schedule};
pub use spec::MoeSpec;
pub use support::Scope;
pub use weights::{InputScales, LoraWeights, Matrix, MlpWeights, MoeWeights, RouterWeights, Tensor};
