//! The test suite. `MOEWE_ADAPTER` picks the adapter under test by a part of its name.

#[cfg(feature = "cli")]
mod ablation;
mod binding;
mod bugs;
mod compiling;
mod configs;
mod conformance;
mod contracts;
#[cfg(feature = "cuda")]
mod cuda;
mod diagnostics;
mod distribution;
mod encoders;
mod families;
mod family_golden;
mod family_specs;
mod family_support;
mod faults;
mod files;
mod gguf;
mod gguf_file;
mod guards;
mod layers;
mod layouts;
mod limits;
mod lockstep;
mod matrix;
mod memory;
mod mutations;
mod pace;
mod packing;
mod quantised;
mod quantising;
mod random;
mod rig;
mod routing;
mod samples;
mod scalars;
mod stages;
mod synthesizing;
#[cfg(feature = "cli")]
mod tool;
mod witnesses;
