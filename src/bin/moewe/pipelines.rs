//! The file in which compiled pipelines are kept from one run to the next.

use std::ffi::OsString;
use std::path::PathBuf;

use moewe::host::PipelineFile;
use moewe::{Result, Wgpu};

use crate::report::warn;

/// Written when it is dropped: at the end of a command, when everything is compiled.
pub struct Pipelines(PipelineFile);

impl Drop for Pipelines {
    fn drop(&mut self) {
        if let Err(error) = self.0.save() {
            warn(&[format!("compiled pipelines are not kept: {}: {error}", self.0.path().display())]);
        }
    }
}

/// The device with the cache of its file, and what to say of that file.
pub fn keep(backend: &Wgpu) -> Result<Option<(Wgpu, Pipelines, Option<String>)>> {
    let Some(folder) = folder(&|name| std::env::var_os(name)) else { return Ok(None) };
    let Some(file) = PipelineFile::open(backend, &folder)? else { return Ok(None) };
    let told = file.unused().map(|why| format!("{} is not used: {why}; it is begun anew", file.path().display()));
    Ok(Some((backend.with_pipeline_cache(file.cache().clone()), Pipelines(file), told)))
}

/// The user's folder for what can be made again; `None` where the environment names none.
fn folder(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("LOCALAPPDATA"));
    base.or_else(|| Some(absolute("HOME")?.join(".cache"))).map(|base| base.join("moewe"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_the_first_that_the_environment_names_by_an_absolute_path() {
        let root = if cfg!(windows) { "C:\\" } else { "/" };
        let given = |pairs: &[(&str, String)]| {
            let pairs = pairs.to_vec();
            folder(&move |name| pairs.iter().find(|(known, _)| *known == name).map(|(_, path)| path.into()))
        };
        let [xdg, local, home] = ["xdg", "local", "home"].map(|name| format!("{root}{name}"));
        let all = [("XDG_CACHE_HOME", xdg.clone()), ("LOCALAPPDATA", local.clone()), ("HOME", home.clone())];
        assert_eq!(given(&all), Some(PathBuf::from(&xdg).join("moewe")));
        assert_eq!(given(&all[1..]), Some(PathBuf::from(&local).join("moewe")));
        assert_eq!(given(&all[2..]), Some(PathBuf::from(&home).join(".cache").join("moewe")));
        // The XDG specification: a relative path is to be ignored.
        let relative = [("XDG_CACHE_HOME", "cache".to_owned()), ("HOME", home.clone())];
        assert_eq!(given(&relative), given(&all[2..]));
        assert_eq!(given(&[("XDG_CACHE_HOME", String::new())]), None);
    }
}
