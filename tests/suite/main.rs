//! The test suite.

mod configs;
mod families;
mod files;
mod layers;
mod layouts;
mod rig;
mod samples;
