//! The test suite. `MOEWE_ADAPTER` picks the adapter under test by a part of its name.

mod binding;
mod configs;
mod contracts;
mod families;
mod files;
mod guards;
mod layers;
mod layouts;
mod lockstep;
mod rig;
mod routing;
mod samples;
mod scalars;
#[cfg(feature = "cli")]
mod tool;
mod witnesses;
