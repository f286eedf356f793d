//! The built binary, as a user meets it.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

mod bench;
mod commands;
mod conformance;
mod doctor;
mod inspect;
mod run;
mod sessions;
mod tune;
mod verify;

/// What an invocation said.
struct Said {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Where the tool keeps compiled pipelines when tests run it: not among the user's own.
const CACHE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/cache");

fn tool(cache: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moewe"));
    command.env("XDG_CACHE_HOME", cache);
    command
}

fn moewe<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Said {
    let output = tool(CACHE).args(args).output().unwrap();
    Said {
        code: output.status.code().expect("ended by a signal"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Said {
    /// The one JSON object on standard output.
    #[track_caller]
    fn json(&self) -> Value {
        let lines = self.lines();
        assert_eq!(lines.len(), 1, "{}", self.stdout);
        lines[0].clone()
    }

    /// A JSON object for each line.
    #[track_caller]
    fn lines(&self) -> Vec<Value> {
        let parse = |line| serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.stdout.lines().map(parse).collect()
    }
}

/// Arguments that choose a backend. Tests of wgpu run on the adapter that `MOEWE_ADAPTER` names, else on
/// the best there is; without one they fail.
fn on(backend: &str) -> Vec<String> {
    let mut args = vec!["--backend".to_owned(), backend.to_owned()];
    if let (true, Ok(adapter)) = (backend == "wgpu", std::env::var("MOEWE_ADAPTER")) {
        args.extend(["--adapter".to_owned(), adapter]);
    }
    args
}

/// Backends that this build has.
fn backends() -> Vec<&'static str> {
    if cfg!(feature = "wgpu") { vec!["reference", "cpu", "wgpu"] } else { vec!["reference", "cpu"] }
}

/// `first`, the backend's arguments and `rest`.
fn arguments(first: &[&str], backend: &str, rest: &[&str]) -> Vec<String> {
    let owned = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    [owned(first), on(backend), owned(rest)].concat()
}

/// Copies a golden case; the originals may be read-only.
fn copy_case(name: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(crate::samples::golden(name)).unwrap() {
        let file = file.unwrap();
        std::fs::write(to.join(file.file_name()), std::fs::read(file.path()).unwrap()).unwrap();
    }
}

/// Changes a key of a case's config.
fn configure(case: &Path, key: &str, value: impl Into<Value>) {
    let path = case.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value.into();
    std::fs::write(path, config.to_string()).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
