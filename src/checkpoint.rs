//! Checkpoints.
/// x
pub struct Checkpoint;
