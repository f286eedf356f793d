//! CUDA C++ to machine code, through NVRTC, with a cache on disk. Needs no device.

use std::ffi::CString;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result as nvrtc, sys};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Compiles for one architecture.
#[derive(Debug, Clone)]
pub struct Compiler {
    arch: String,
    version: (i32, i32),
    cache: Option<PathBuf>,
}

impl Compiler {
    /// For an architecture by its name in NVRTC, such as `sm_90a`. Machine code is kept in [`Compiler::cache_dir`].
    ///
    /// # Errors
    /// There is no NVRTC.
    #[allow(unsafe_code, reason = "NVRTC")]
    pub fn new(arch: &str) -> Result<Self> {
        // SAFETY: loads the library and calls nothing in it.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device {
                backend: "cuda",
                operation: "loading NVRTC".into(),
                reason: "found no libnvrtc.so, libnvrtc.so.13 or libnvrtc.so.12 (on Windows nvrtc64_*.dll) where the \
                         system looks for libraries, expected one; install NVIDIA's CUDA toolkit or its PyPI package \
                         nvidia-cuda-nvrtc and name its folder in LD_LIBRARY_PATH"
                    .into(),
            });
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to integers of this frame.
        let status = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
        status.result().map_err(|error| failed("asking NVRTC for its version", &error))?;
        Ok(Self { arch: arch.into(), version: (major, minor), cache: Self::cache_dir() })
    }

    /// The same compiler with its cache elsewhere; `None` keeps nothing.
    #[must_use]
    pub fn with_cache(mut self, folder: Option<PathBuf>) -> Self {
        self.cache = folder;
        self
    }

    /// `moewe/cuda` in the folder for caches of this user: `XDG_CACHE_HOME`, `LOCALAPPDATA` or `~/.cache`. A relative
    /// path counts as none.
    pub fn cache_dir() -> Option<PathBuf> {
        let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let root = variable("XDG_CACHE_HOME")
            .or_else(|| variable("LOCALAPPDATA"))
            .or_else(|| Some(variable("HOME")?.join(".cache")))?;
        Some(root.join("moewe").join("cuda"))
    }

    /// Architecture that it compiles for.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// Machine code (CUBIN) of a text: from the cache if it is there and `accept` takes it, else compiled and kept.
    /// A cache that cannot be read or written costs the time to compile and nothing else.
    ///
    /// # Errors
    /// What NVRTC says of the text, or what `accept` says of fresh code.
    pub fn compile<T>(&self, name: &str, text: &str, accept: impl Fn(Vec<u8>) -> Result<T>) -> Result<T> {
        let file = self.cache.as_ref().map(|folder| folder.join(self.key(text)));
        if let Some(code) = file.as_ref().and_then(|file| fs::read(file).ok())
            && let Ok(accepted) = accept(code)
        {
            return Ok(accepted);
        }
        let (code, _) = self.build(name, text, &[])?;
        if let Some(file) = file {
            // Another process may write the same: each moves a whole file into place.
            drop(keep(&file, &code));
        }
        accept(code)
    }

    /// All that the machine code depends on.
    fn key(&self, text: &str) -> String {
        let (major, minor) = self.version;
        let mut hash = Sha256::new();
        hash.update(format!("{}\n{major}.{minor}\n{}\n", self.arch, OPTIONS.join(" ")));
        hash.update(text);
        let digits: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{digits}.cubin")
    }

    /// What the assembler says of a text: registers, shared memory, and what it spills.
    ///
    /// # Errors
    /// What NVRTC says of the text.
    pub fn resources(&self, name: &str, text: &str) -> Result<String> {
        self.build(name, text, &["--ptxas-options=-v"]).map(|(_, log)| log)
    }

    /// Machine code, and what was said of it.
    #[allow(unsafe_code, reason = "NVRTC")]
    fn build(&self, name: &str, text: &str, more: &[&str]) -> Result<(Vec<u8>, String)> {
        let operation = || format!("compiling {name} for {}", self.arch);
        let failed = |error: nvrtc::NvrtcError, log: &str| Error::Device {
            backend: "cuda",
            operation: operation(),
            reason: format!("{error:?}: {log}"),
        };
        let text = CString::new(text).map_err(|error| Error::Device {
            backend: "cuda",
            operation: operation(),
            reason: error.to_string(),
        })?;
        let program = Program(nvrtc::create_program(&text, None).map_err(|error| failed(error, ""))?);
        let mut options: Vec<String> = OPTIONS.iter().chain(more).map(|&option| option.into()).collect();
        options.push(format!("--gpu-architecture={}", self.arch));
        // SAFETY: the program is live until this frame ends, its text too. No option holds a NUL.
        let compiled = unsafe { nvrtc::compile_program(program.0, &options) };
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program.0) }.unwrap_or_default();
        let log: Vec<u8> = log.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
        let log = String::from_utf8_lossy(&log).trim_end().to_owned();
        if let Err(error) = compiled {
            return Err(failed(error, &log));
        }
        let mut bytes = 0;
        // SAFETY: the program is compiled, and the size is written to this frame.
        unsafe { sys::nvrtcGetCUBINSize(program.0, &mut bytes) }.result().map_err(|error| failed(error, ""))?;
        let mut code = vec![0u8; bytes];
        // SAFETY: the program is compiled, and NVRTC writes as many bytes as it has just said.
        unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }
            .result()
            .map_err(|error| failed(error, ""))?;
        Ok((code, log))
    }
}

/// Neither fast mathematics nor flushed subnormals: results are the spec's. Functions that a kernel does not call are no
/// fault.
/// Functions without a space are the device's: lambdas that are templates cannot say so for all releases of NVRTC.
const OPTIONS: [&str; 5] = ["--std=c++17", "--fmad=true", "--ftz=false", "--diag-suppress=177", "-default-device"];

/// An NVRTC program, destroyed with its frame.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    #[allow(unsafe_code, reason = "NVRTC")]
    fn drop(&mut self) {
        // SAFETY: created by NVRTC and destroyed once.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

fn failed(operation: &str, error: &nvrtc::NvrtcError) -> Error {
    Error::Device { backend: "cuda", operation: operation.into(), reason: format!("{error:?}") }
}

/// Writes a file so that no reader sees a part of it.
fn keep(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let unfinished = folder.join(format!("{}.{:?}.part", std::process::id(), std::thread::current().id()));
    let written = fs::File::create(&unfinished).and_then(|mut part| part.write_all(bytes));
    let moved = written.and_then(|()| fs::rename(&unfinished, file));
    if moved.is_err() {
        drop(fs::remove_file(&unfinished));
    }
    moved
}
