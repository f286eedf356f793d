//! What can go wrong, each with what was found, what was expected and what to change.

use std::borrow::Cow;
use std::path::PathBuf;

/// A backend lacks a part of the spec. Given when a plan is made, never later.
///
/// ```text
/// cpu does not support precision.block_scale = Folded: no folded scales yet
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{backend} does not support {field} = {value}: {because}")]
pub struct Unsupported {
    /// Who refuses: a backend, a model family, or the tool.
    pub backend: Cow<'static, str>,
    /// Path of the field in [`MoeSpec`](crate::MoeSpec) or in `config.json`.
    pub field: Cow<'static, str>,
    /// The value that is not supported.
    pub value: String,
    /// What is missing.
    pub because: Cow<'static, str>,
}

/// Every failure of this crate. Each variant shows a message that it gives; the test suite compares them.
///
/// A failure of a device comes back from the call that met it. [`Error::DeviceLost`] and [`Error::OutOfMemory`] stand
/// apart because a host answers them otherwise than a fault of its own:
///
/// ```
/// use moewe::{Backend, Cpu, Error};
///
/// match Cpu::new().create_buffer("too large for any machine", 1 << 60, false) {
///     Err(Error::OutOfMemory { backend, operation, reason: _ }) => {
///         assert_eq!((backend, operation.as_str()), ("cpu", "allocating 1152921504606846976 bytes"));
///     }
///     Err(Error::DeviceLost { .. }) => unreachable!("a new device, and the plans anew"),
///     Err(error) => unreachable!("a fault of the caller, or of the driver: {error}"),
///     Ok(_) => unreachable!("that is an exabyte"),
/// }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The spec is legal but this backend lacks a part of it.
    ///
    /// ```text
    /// cpu does not support precision.block_scale = Folded: no folded scales yet
    /// ```
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// A value breaks a rule of the spec, of a file format or of a call.
    ///
    /// ```text
    /// max_tokens: found 0, expected 1 to 2^24; plan for the largest batch you will run
    /// ```
    #[error("{field}: found {found}, expected {expected}; {remedy}")]
    Invalid {
        /// The field, key, tensor or argument.
        field: Cow<'static, str>,
        /// What is there.
        found: String,
        /// What has to be there.
        expected: String,
        /// What to change.
        remedy: Cow<'static, str>,
    },
    /// A tensor that the layer needs is in none of the shards that are present.
    ///
    /// ```text
    /// tensor model.layers.2.block_sparse_moe.experts.3.w2.weight: found none in 1 of 1 shards in memory, expected one;
    /// download the shard that holds it, or ask for a layer that is here
    /// ```
    #[error("tensor {name}: found none in {searched}, expected one; {remedy}")]
    MissingTensor {
        /// Name, or the alternatives that were tried.
        name: String,
        /// Where it was looked for.
        searched: String,
        /// What to change.
        remedy: Cow<'static, str>,
    },
    /// A file could not be read.
    ///
    /// ```text
    /// nowhere: cannot be read (No such file or directory (os error 2)); check the path and its permissions
    /// ```
    #[error("{}: cannot be read ({source}); check the path and its permissions", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not the safetensors file it claims to be.
    ///
    /// ```text
    /// weights.safetensors: found a damaged safetensors file (header too small), expected a header that describes
    /// exactly the bytes behind it; download or convert the file again
    /// ```
    #[error("{}: found a damaged safetensors file ({source}), expected a header that describes exactly the bytes behind it; download or convert the file again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        source: safetensors::SafeTensorError,
    },
    /// A file is not the JSON it should be.
    ///
    /// ```text
    /// config.json: found malformed JSON (EOF while parsing an object at line 1 column 1), expected one JSON object;
    /// repair or download the file again
    /// ```
    #[error("{}: found malformed JSON ({source}), expected one JSON object; repair or download the file again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// The device is gone: destroyed by its owner, reset or unplugged. Plans on it are of no use; one on a new
    /// device gives the same bits.
    ///
    /// ```text
    /// wgpu: found the device lost while creating buffer x of 64 bytes, expected a working one; open a device and plan
    /// on it
    /// ```
    #[error("{backend}: found the device lost while {operation}, expected a working one; open a device and plan on it")]
    DeviceLost {
        /// The backend.
        backend: &'static str,
        /// What we asked for.
        operation: String,
    },
    /// There is not as much memory as we asked for. The device lives on, and so does what was planned on it.
    ///
    /// ```text
    /// cpu: found no memory for allocating 1152921504606846976 bytes; plan for fewer tokens or free some (memory
    /// allocation failed ...
    /// ```
    #[error("{backend}: found no memory for {operation}; plan for fewer tokens or free some ({reason})")]
    OutOfMemory {
        /// The backend.
        backend: &'static str,
        /// What we asked for.
        operation: String,
        /// The API's answer.
        reason: String,
    },
    /// The device's API refused one of our calls. The device lives on.
    ///
    /// ```text
    /// wgpu: binding buffers (storage usage is required) failed: Validation Error ...
    /// ```
    #[error("{backend}: {operation} failed: {reason}")]
    Device {
        /// The backend.
        backend: &'static str,
        /// What we asked for.
        operation: String,
        /// The API's answer.
        reason: String,
    },
}

/// Shorthand for a result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A broken rule, in the four parts that every message has.
    pub fn invalid(
        field: impl Into<Cow<'static, str>>,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
        remedy: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Invalid {
            field: field.into(),
            found: found.to_string(),
            expected: expected.to_string(),
            remedy: remedy.into(),
        }
    }
}
