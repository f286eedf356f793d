//! Mixture-of-Experts layers on any GPU, proved field by field against one reference.

pub mod checkpoint;
pub mod error;
pub mod families;
pub mod numerics;
pub mod spec;
pub mod weights;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result, Unsupported};
pub use spec::MoeSpec;
pub use weights::{Matrix, MlpWeights, MoeWeights, RouterWeights, Tensor};
