//! Finding libcuda, NVRTC and cuBLASLt at run time, so that one binary runs everywhere.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ampoule_backend::BackendError;
use cudarc::{cublaslt, driver, nvrtc};

/// Folders to look in besides the loader's own, separated like `PATH`.
pub const LIBS_VARIABLE: &str = "AMPOULE_CUDA_LIBS";

const DRIVER_SYMBOLS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuGetErrorString",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostGetDevicePointer_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD32Async",
    "cuCtxGetStreamPriorityRange",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamQuery",
    "cuStreamWaitEvent",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime_v2",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuLaunchKernelEx",
    "cuGraphInstantiateWithFlags",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphGetNodes",
    "cuGraphUpload",
    "cuGraphLaunch",
];
const NVRTC_SYMBOLS: &[&str] = &[
    "nvrtcVersion",
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
    "nvrtcGetErrorString",
];
const CUBLASLT_SYMBOLS: &[&str] = &[
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtGetVersion",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulAlgoConfigGetAttribute",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];

/// Whether the driver library is usable; else a sentence.
pub(crate) fn driver() -> Result<(), BackendError> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: loading libcuda runs its initialisers, which are made for that.
        if !unsafe { driver::sys::is_culib_present() } {
            return Err("libcuda was not found: there is no NVIDIA driver here".to_owned());
        }
        // SAFETY: the library is present, so this does not panic.
        missing(unsafe { driver::sys::culib() }, DRIVER_SYMBOLS).map_or(Ok(()), |s| {
            Err(format!("libcuda lacks {s}: the driver is too old; 12.8 is needed"))
        })
    });
    found.clone().map_err(|problem| unavailable("NVIDIA driver", problem))
}

/// Whether NVRTC is usable; else a sentence.
pub(crate) fn nvrtc() -> Result<(), BackendError> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: loading NVRTC runs its initialisers, which are made for that.
        let present = || unsafe { nvrtc::sys::is_culib_present() };
        let files = ["libnvrtc-builtins.so.13", "libnvrtc.so.13"];
        find(&files, "nvidia-cuda-nvrtc", present)?;
        // SAFETY: the library is present, so this does not panic.
        missing(unsafe { nvrtc::sys::culib() }, NVRTC_SYMBOLS).map_or(Ok(()), |s| {
            let file = mapped("libnvrtc.so");
            Err(format!("{file} lacks {s}: CUDA 13 is needed"))
        })
    });
    found.clone().map_err(|problem| unavailable("NVRTC", problem))
}

/// Whether cuBLASLt is usable; else a sentence.
pub(crate) fn cublaslt() -> Result<(), BackendError> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: loading cuBLASLt runs its initialisers, which are made for that.
        let present = || unsafe { cublaslt::sys::is_culib_present() };
        find(&["libcublasLt.so.13"], "nvidia-cublas", present)?;
        // SAFETY: the library is present, so this does not panic.
        missing(unsafe { cublaslt::sys::culib() }, CUBLASLT_SYMBOLS).map_or(Ok(()), |s| {
            let file = mapped("libcublasLt.so");
            Err(format!("{file} lacks {s}: CUDA 13 is needed"))
        })
    });
    found.clone().map_err(|problem| unavailable("cuBLASLt", problem))
}

fn unavailable(library: &str, problem: String) -> BackendError {
    BackendError::Device { device: library.to_owned(), problem }
}

/// Makes the last of `files` one that the loader finds by name: first from the folders named for us, then from wherever the
/// loader looks, then from where CUDA is usually installed. A sentence if there is none.
fn find(files: &[&str], package: &str, present: impl Fn() -> bool) -> Result<(), String> {
    let named = folders(LIBS_VARIABLE);
    let mut problems: Vec<String> = named
        .iter()
        .filter(|folder| !folder.is_dir())
        .map(|folder| format!("'{}' in {LIBS_VARIABLE} is no folder", folder.display()))
        .collect();
    problems.extend(preload(files, &named));
    if present() {
        return Ok(());
    }
    // Looking for every Python takes a while: only where it is needed.
    let usual = usual_folders(&folders("LD_LIBRARY_PATH"), &python_packages(&folders("PATH")));
    problems.extend(preload(files, &usual));
    if present() {
        return Ok(());
    }
    let file = files.last().unwrap_or(&"");
    let there = named.iter().chain(&usual).filter(|folder| folder.is_dir());
    let mut looked = vec!["the loader's path".to_owned()];
    looked.extend(there.map(|folder| folder.display().to_string()));
    let told = [vec![looked.join(", ")], problems].concat().join("; ");
    Err(format!(
        "{file} was not found: install the CUDA 13 toolkit or `pip install {package}`, or name its folder in {LIBS_VARIABLE} \
         (looked for in {told})"
    ))
}

/// The file that a library was loaded from; its name where the system does not tell.
fn mapped(name: &str) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    path.into_iter().find(|path| path.contains(name)).unwrap_or(name).to_owned()
}

/// The first symbol the library lacks.
fn missing(library: &libloading::Library, symbols: &[&'static str]) -> Option<&'static str> {
    symbols.iter().copied().find(|name| {
        // SAFETY: the symbol is only looked up, never called through this type.
        unsafe { library.get::<*mut std::ffi::c_void>(name.as_bytes()) }.is_err()
    })
}

/// Loads libraries by absolute path, so that later loads by name find them. They stay loaded. Says which files were there
/// and could not be loaded.
fn preload(files: &[&str], folders: &[PathBuf]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        for path in folders.iter().flat_map(|folder| matching(folder, file)) {
            // SAFETY: loading NVIDIA's libraries runs their initialisers, which are made for that.
            let opened = unsafe {
                use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
                Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL)
            };
            match opened {
                Ok(library) => {
                    std::mem::forget(library);
                    break;
                }
                Err(error) => problems.push(format!("{} does not load: {error}", path.display())),
            }
        }
    }
    problems
}

/// Files of the folder called `file` or `file.something`.
fn matching(folder: &Path, file: &str) -> Vec<PathBuf> {
    let exact = folder.join(file);
    if exact.exists() {
        return vec![exact];
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .filter(|e| e.file_name().to_string_lossy().starts_with(&format!("{file}.")))
        .map(|e| e.path())
        .collect();
    found.sort();
    found
}

/// The folders that a variable names.
fn folders(variable: &str) -> Vec<PathBuf> {
    let value = std::env::var_os(variable).unwrap_or_default();
    std::env::split_paths(&value).filter(|folder| !folder.as_os_str().is_empty()).collect()
}

/// Where to look, in order: the loader's folders, the toolkit's, Python packages of NVIDIA.
fn usual_folders(loader: &[PathBuf], packages: &[PathBuf]) -> Vec<PathBuf> {
    let mut folders = loader.to_vec();
    for base in ["/usr/local/cuda", "/usr/local/cuda-13", "/usr/local/cuda-13.0", "/opt/cuda"] {
        folders.push(Path::new(base).join("lib64"));
        folders.push(Path::new(base).join("targets/x86_64-linux/lib"));
    }
    for package in packages {
        let Ok(entries) = std::fs::read_dir(package.join("nvidia")) else { continue };
        let mut inside: Vec<PathBuf> =
            entries.filter_map(Result::ok).map(|e| e.path().join("lib")).collect();
        inside.sort();
        folders.extend(inside);
    }
    folders
}

/// `site-packages` and `dist-packages` of the active environment and of every Python on the path.
fn python_packages(path: &[PathBuf]) -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .iter()
        .filter_map(|name| std::env::var_os(name).map(PathBuf::from))
        .collect();
    for bin in path {
        for python in ["python3", "python"] {
            let Ok(real) = bin.join(python).canonicalize() else { continue };
            prefixes.extend(bin.parent().map(Path::to_path_buf));
            prefixes.extend(real.parent().and_then(Path::parent).map(Path::to_path_buf));
        }
    }
    let mut packages = Vec::new();
    for prefix in prefixes {
        for lib in ["lib", "lib64", "local/lib"] {
            let Ok(entries) = std::fs::read_dir(prefix.join(lib)) else { continue };
            for entry in entries.filter_map(Result::ok) {
                if entry.file_name().to_string_lossy().starts_with("python3") {
                    for kind in ["site-packages", "dist-packages"] {
                        let folder = entry.path().join(kind);
                        if folder.is_dir() && !packages.contains(&folder) {
                            packages.push(folder);
                        }
                    }
                }
            }
        }
    }
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is missing is told in a sentence only if it is looked for.
    #[test]
    fn every_driver_call_is_looked_for() {
        let sources = [
            include_str!("driver.rs"),
            include_str!("capture.rs"),
            include_str!("device.rs"),
            include_str!("kernels.rs"),
            include_str!("bench.rs"),
        ];
        // Asked for by name only, where a profiler is attached.
        let optional = ["cuProfilerStart", "cuProfilerStop"];
        let mut seen = 0;
        for call in sources.iter().flat_map(|source| source.split("sys::").skip(1)) {
            let name = call.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
            let called = call[name.len()..].starts_with('(');
            let of_driver = name.starts_with("cu") && name[2..].starts_with(char::is_uppercase);
            if called && of_driver && !optional.contains(&name) {
                assert!(DRIVER_SYMBOLS.contains(&name), "'{name}' is not looked for");
                seen += 1;
            }
        }
        assert!(seen > 30, "{seen}");
    }

    #[test]
    fn python_packages_are_searched_last() {
        let root = tempfile::tempdir().unwrap();
        let packages = root.path().join("site-packages");
        std::fs::create_dir_all(packages.join("nvidia/cu13/lib")).unwrap();
        let loader = vec![root.path().join("mine")];
        let folders = usual_folders(&loader, std::slice::from_ref(&packages));
        assert_eq!(folders.first(), loader.first());
        assert_eq!(folders.last(), Some(&packages.join("nvidia/cu13/lib")));
    }

    #[test]
    fn a_file_that_does_not_load_is_named() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("libnvrtc.so.13");
        std::fs::write(&file, b"no library").unwrap();
        let problems = preload(&["libnvrtc.so.13"], &[root.path().to_path_buf()]);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains(file.to_str().unwrap()), "{problems:?}");
        // Nothing that is there is called so.
        let none = find(&["libampoule-none.so.13"], "a-package", || false).unwrap_err();
        for words in
            ["libampoule-none.so.13 was not found", "`pip install a-package`", LIBS_VARIABLE]
        {
            assert!(none.contains(words), "{none}");
        }
        assert_eq!(mapped("libampoule-none.so"), "libampoule-none.so");
    }

    #[test]
    fn a_versioned_file_is_found_by_its_soname() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("libnvrtc.so.13.0.88");
        std::fs::write(&file, b"").unwrap();
        assert_eq!(matching(root.path(), "libnvrtc.so.13"), vec![file]);
        assert!(matching(root.path(), "libcublasLt.so.13").is_empty());
        assert!(matching(&root.path().join("none"), "libnvrtc.so.13").is_empty());
    }

    #[test]
    fn a_missing_library_is_a_sentence_not_a_panic() {
        for result in [driver(), nvrtc(), cublaslt()] {
            if let Err(error) = result {
                assert!(error.to_string().contains("was not found"), "{error}");
            }
        }
    }
}
