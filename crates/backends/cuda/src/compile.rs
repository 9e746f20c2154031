//! Kernel sources, compiled by NVRTC for the device at hand.

use std::ffi::{CStr, CString};
use std::ptr;

use ampoule_backend::BackendError;
use cudarc::nvrtc::sys;

use crate::cache::Cache;
use crate::libs;

pub(crate) const COMMON: &str = include_str!("../kernels/common.cuh");

/// Every kernel source: name and text after the common part.
pub(crate) const SOURCES: &[(&str, &str)] = &[
    ("attention", include_str!("../kernels/attention.cu")),
    ("elementwise", include_str!("../kernels/elementwise.cu")),
    ("gemm", include_str!("../kernels/gemm.cu")),
    (
        "chain",
        concat!(
            include_str!("../kernels/products.cuh"),
            include_str!("../kernels/bulk.cuh"),
            include_str!("../kernels/chain.cu"),
        ),
    ),
    ("gemv", concat!(include_str!("../kernels/products.cuh"), include_str!("../kernels/gemv.cu"))),
    ("memory", concat!(include_str!("../kernels/bulk.cuh"), include_str!("../kernels/memory.cu"))),
    ("recurrent", include_str!("../kernels/recurrent.cu")),
    ("sample", include_str!("../kernels/sample.cu")),
];

/// As `scripts/cuda_check.py` compiles them.
const OPTIONS: &[&str] = &["--std=c++17", "--fmad=true"];

/// The architecture name NVRTC knows for a compute capability: architecture-specific features where they exist.
pub(crate) fn architecture(major: i32, minor: i32) -> String {
    let suffix = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{suffix}")
}

/// NVRTC's version.
pub(crate) fn version() -> Result<(i32, i32), BackendError> {
    libs::nvrtc()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC is loaded; both are written.
    check(unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }, "asking for the version")?;
    Ok((major, minor))
}

/// Digest of everything compiled results depend on but the architecture.
pub(crate) fn source_digest() -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(COMMON.as_bytes());
    for (name, text) in SOURCES {
        hasher.update(name.as_bytes());
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    for option in OPTIONS {
        hasher.update(option.as_bytes());
    }
    hasher.finalize()
}

/// The cubin of one source, from the cache or compiled. A kernel's cubin from the cache needs no NVRTC call but its version.
pub(crate) fn cubin(
    cache: &Cache,
    name: &str,
    architecture: &str,
) -> Result<Compiled, BackendError> {
    let Some((_, text)) = SOURCES.iter().find(|(n, _)| *n == name) else {
        return Err(error(format!("there is no kernel source '{name}'")));
    };
    let source = format!("{COMMON}{text}");
    let (major, minor) = version()?;
    let key = cache_key(&source, architecture, (major, minor));
    if let Some(cubin) = cache.load(&key) {
        return Ok(Compiled { cubin, not_kept: None });
    }
    let cubin = compile(&source, name, architecture)?;
    let not_kept = cache.store(&key, &cubin).err();
    Ok(Compiled { cubin, not_kept })
}

/// Whether the cache has all sources, compiled for this architecture.
pub(crate) fn is_cached(cache: &Cache, architecture: &str) -> Result<bool, BackendError> {
    let version = version()?;
    let has = |text: &str| cache.has(&cache_key(&format!("{COMMON}{text}"), architecture, version));
    Ok(SOURCES.iter().all(|(_, text)| has(text)))
}

/// A compiled source.
#[derive(Debug, PartialEq)]
pub(crate) struct Compiled {
    pub(crate) cubin: Vec<u8>,
    /// Why the cache does not have it now.
    pub(crate) not_kept: Option<String>,
}

fn cache_key(source: &str, architecture: &str, version: (i32, i32)) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [source, architecture, &format!("{}.{}", version.0, version.1), &OPTIONS.join(" ")]
    {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Compiles to a cubin.
pub(crate) fn compile(
    source: &str,
    name: &str,
    architecture: &str,
) -> Result<Vec<u8>, BackendError> {
    libs::nvrtc()?;
    let text = |s: &str| CString::new(s).map_err(|e| error(format!("kernel source '{name}': {e}")));
    let (source, file) = (text(source)?, text(&format!("{name}.cu"))?);
    let mut options = Vec::new();
    for option in OPTIONS {
        options.push(text(option)?);
    }
    options.push(text(&format!("--gpu-architecture={architecture}"))?);
    let pointers: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();

    let mut program = Program(ptr::null_mut());
    // SAFETY: all texts are NUL-terminated and outlive the call; there are no headers.
    let status = unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program.0,
            source.as_ptr(),
            file.as_ptr(),
            0,
            ptr::null(),
            ptr::null(),
        )
    };
    check(status, name)?;
    // SAFETY: the program exists; the options are NUL-terminated and outlive the call.
    let status =
        unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as i32, pointers.as_ptr()) };
    if status != sys::nvrtcResult::NVRTC_SUCCESS {
        return Err(error(format!("compiling '{name}' for {architecture}: {}", program.log())));
    }
    let mut size = 0;
    // SAFETY: the program is compiled; `size` is written.
    check(unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut size) }, name)?;
    let mut cubin = vec![0_u8; size];
    // SAFETY: `cubin` has the size just asked for.
    check(unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()) }, name)?;
    Ok(cubin)
}

/// A program of NVRTC, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program exists; `size` is written.
        let status = unsafe { sys::nvrtcGetProgramLogSize(self.0, &raw mut size) };
        if status != sys::nvrtcResult::NVRTC_SUCCESS || size == 0 {
            return "no log".to_owned();
        }
        let mut log = vec![0_u8; size];
        // SAFETY: `log` has the size just asked for.
        unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) };
        String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: created once, destroyed once.
            unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
        }
    }
}

fn check(status: sys::nvrtcResult, what: &str) -> Result<(), BackendError> {
    if status == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: NVRTC returns a static, NUL-terminated string for every status.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(status)) }.to_string_lossy();
    Err(error(format!("{what}: {text}")))
}

fn error(problem: String) -> BackendError {
    BackendError::Device { device: "NVRTC".to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_depends_on_every_part() {
        let key = cache_key("source", "sm_90a", (13, 0));
        assert_ne!(key, cache_key("Source", "sm_90a", (13, 0)));
        assert_ne!(key, cache_key("source", "sm_80", (13, 0)));
        assert_ne!(key, cache_key("source", "sm_90a", (13, 1)));
        assert_eq!(key, cache_key("source", "sm_90a", (13, 0)));
    }

    #[test]
    fn architectures_have_the_names_of_nvrtc() {
        assert_eq!(architecture(8, 0), "sm_80");
        assert_eq!(architecture(8, 9), "sm_89");
        assert_eq!(architecture(9, 0), "sm_90a");
        assert_eq!(architecture(12, 0), "sm_120a");
    }

    /// Needs NVRTC, but no GPU; skipped with a sentence where NVRTC is not installed.
    #[test]
    fn a_source_compiles_once_and_then_comes_from_the_cache() {
        if let Err(error) = libs::nvrtc() {
            assert!(std::env::var_os("AMPOULE_REQUIRE_NVRTC").is_none(), "{error}");
            println!("skipped: {error}");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let first = cubin(&cache, "gemm", "sm_80").unwrap();
        assert_eq!(&first.cubin[..4], b"\x7fELF");
        assert_eq!(first.not_kept, None);
        assert_eq!(cubin(&cache, "gemm", "sm_80").unwrap(), first);
        let entries = || std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path());
        let entry = entries().next().unwrap();
        assert_eq!(entries().count(), 1);
        // A damaged entry is compiled again, and is whole then.
        let whole = std::fs::read(&entry).unwrap();
        let mut bytes = whole.clone();
        bytes[whole.len() / 2] ^= 1;
        std::fs::write(&entry, bytes).unwrap();
        assert_eq!(cubin(&cache, "gemm", "sm_80").unwrap(), first);
        assert_eq!(std::fs::read(&entry).unwrap(), whole);
        assert!(!is_cached(&cache, "sm_80").unwrap());
        for (_, text) in SOURCES {
            let key = cache_key(&format!("{COMMON}{text}"), "sm_80", version().unwrap());
            cache.store(&key, b"kernels").unwrap();
        }
        assert!(is_cached(&cache, "sm_80").unwrap() && !is_cached(&cache, "sm_90a").unwrap());
        let failed = compile("__global__ void k() { nonsense; }", "bad", "sm_80").unwrap_err();
        assert!(failed.to_string().contains("nonsense"), "{failed}");
    }
}
