//! Proof that a backend drops no field of the spec: layers to try it with, and what they show.
//!
//! For the tool, the tests and the benches; no other part of the library uses it.

mod matrix;
pub mod sample;
pub mod synthetic;
