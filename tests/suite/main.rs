//! The test suite.

mod configs;
mod contracts;
mod families;
mod files;
mod guards;
mod layers;
mod layouts;
mod lockstep;
mod rig;
mod samples;
