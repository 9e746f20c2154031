//! The compiled kernels of one device, by name.

use std::collections::HashMap;
use std::sync::Arc;

use ampoule_backend::BackendError;
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute};

use crate::cache::Cache;
use crate::compile;
use crate::driver::{Context, Module, check, device_error};

/// Kernels of each source.
const NAMES: &[(&str, &[&str])] = &[
    (
        "elementwise",
        &[
            "embed",
            "rms_norm_block",
            "rms_norm_warp",
            "gated_rms_norm_block",
            "gated_rms_norm_warp",
            "sigmoid_gate",
            "swiglu",
            "rope",
            "kv_append",
            "last_row",
            "observe",
            "begin_reply",
            "advance",
            "fill",
            "copy_rows",
            "add_bias",
            "norm_rope_append",
        ],
    ),
    (
        "gemv",
        &[
            "gemv_f32_1",
            "gemv_f32_2",
            "gemv_f32_4",
            "gemv_f32_8",
            "gemv_bf16_1",
            "gemv_bf16_2",
            "gemv_bf16_4",
            "gemv_bf16_8",
            "gemv_f16_1",
            "gemv_f16_2",
            "gemv_f16_4",
            "gemv_f16_8",
            "gemv_bf16_packed_2",
            "gemv_bf16_packed_4",
            "gemv_bf16_packed_8",
            "gemv_f16_packed_2",
            "gemv_f16_packed_4",
            "gemv_f16_packed_8",
        ],
    ),
    ("chain", &["chain_bf16", "chain_f16"]),
    ("gemm", &["gemm_f32", "gemm_bf16", "gemm_f16"]),
    (
        "attention",
        &[
            "attention_split_f32_1",
            "attention_split_f32_2",
            "attention_split_f32_4",
            "attention_split_bf16_1",
            "attention_split_bf16_2",
            "attention_split_bf16_4",
            "attention_stream_bf16_64_1",
            "attention_stream_bf16_64_2",
            "attention_stream_bf16_64_4",
            "attention_stream_bf16_128_1",
            "attention_stream_bf16_128_2",
            "attention_stream_bf16_128_4",
            "attention_stream_bf16_256_1",
            "attention_stream_bf16_256_2",
            "attention_stream_bf16_256_4",
            "attention_stream_f16_64_1",
            "attention_stream_f16_64_2",
            "attention_stream_f16_64_4",
            "attention_stream_f16_128_1",
            "attention_stream_f16_128_2",
            "attention_stream_f16_128_4",
            "attention_stream_f16_256_1",
            "attention_stream_f16_256_2",
            "attention_stream_f16_256_4",
            "attention_split_f16_1",
            "attention_split_f16_2",
            "attention_split_f16_4",
            "attention_combine",
            "attention_rows",
            "attention_parts",
            "attention_tiles_bf16_64",
            "attention_tiles_bf16_128",
            "attention_tiles_bf16_256",
            "attention_tiles_f16_64",
            "attention_tiles_f16_128",
            "attention_tiles_f16_256",
        ],
    ),
    (
        "recurrent",
        &[
            "causal_conv",
            "gated_delta_step_8",
            "gated_delta_step_wide_1",
            "gated_delta_step_wide_2",
            "gated_delta_step_wide_4",
            "gated_delta_tokens_1",
            "gated_delta_tokens_2",
            "gated_delta_tokens_4",
            "gated_delta_tokens_8",
        ],
    ),
    ("sample", &["sample"]),
    (
        "memory",
        &[
            "copy_bulk_8",
            "copy_bulk_96",
            "copy_bulk_960",
            "copy_regions_8",
            "copy_regions_96",
            "copy_regions_960",
            "copy_beside_8",
            "copy_beside_96",
            "copy_beside_960",
            "random_fill",
            "periodic_fill",
            "count_differences",
            "dequantise",
            "read_all",
        ],
    ),
];

/// Kernels whose shared memory is sized at launch.
const DYNAMIC: &[&str] = &[
    "chain_",
    "copy_bulk_",
    "gemv_",
    "attention_rows",
    "attention_stream_",
    "attention_tiles_",
    "sample",
];

/// Kernels that copy: by bulk copies, by threads, beside replays; for tables of 8, 96 and 960 pieces.
pub(crate) const COPY_KERNELS: [[&str; 3]; 3] = [
    ["copy_bulk_8", "copy_bulk_96", "copy_bulk_960"],
    ["copy_regions_8", "copy_regions_96", "copy_regions_960"],
    ["copy_beside_8", "copy_beside_96", "copy_beside_960"],
];

/// A kernel and the most shared memory a launch may ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    pub(crate) function: CUfunction,
    pub(crate) shared_limit: u32,
}

/// Every kernel, compiled for one device.
pub(crate) struct Kernels {
    by_name: HashMap<&'static str, Kernel>,
    /// Those of [`COPY_KERNELS`]: a restore looks nothing up by name.
    copies: [[Kernel; 3]; 3],
    /// Why what was compiled is not in the cache.
    pub(crate) not_kept: Option<String>,
    /// Keeps the functions valid.
    #[allow(dead_code)]
    modules: Vec<Module>,
}

// SAFETY: functions are process-wide handles, valid while their modules are loaded.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Compiles or reads from the cache, and loads. Sources compile side by side.
    pub(crate) fn load(
        context: &Arc<Context>,
        architecture: &str,
        shared_per_block: u32,
    ) -> Result<Self, BackendError> {
        let cache = Cache::of_user();
        let compiled: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = NAMES
                .iter()
                .map(|(source, _)| scope.spawn(|| compile::cubin(&cache, source, architecture)))
                .collect();
            threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
        });
        let mut by_name = HashMap::new();
        let mut modules = Vec::new();
        let mut not_kept = None;
        for ((source, names), cubin) in NAMES.iter().zip(compiled) {
            let compiled =
                cubin.map_err(|_| device_error(format!("compiling '{source}' panicked")))??;
            not_kept = not_kept.or(compiled.not_kept);
            let module = Module::load(context, &compiled.cubin, source)?;
            for name in *names {
                let function = module.function(name)?;
                let mut shared_limit = 0;
                if DYNAMIC.iter().any(|d| name.starts_with(d)) {
                    shared_limit = raise_shared_limit(function, name, shared_per_block)?;
                }
                if name.starts_with("copy_beside") {
                    leave_shared_memory(function, name)?;
                }
                by_name.insert(*name, Kernel { function, shared_limit });
            }
            modules.push(module);
        }
        let mut copies = [[named(&by_name, COPY_KERNELS[0][0])?; 3]; 3];
        for (names, kernels) in COPY_KERNELS.iter().zip(&mut copies) {
            for (name, kernel) in names.iter().zip(kernels) {
                *kernel = named(&by_name, name)?;
            }
        }
        Ok(Self { by_name, copies, not_kept, modules })
    }

    /// The kernel of this row and column of [`COPY_KERNELS`].
    pub(crate) const fn copy(&self, row: usize, column: usize) -> Kernel {
        self.copies[row][column]
    }

    /// The kernel called `name`.
    pub(crate) fn find(&self, name: &str) -> Result<Kernel, BackendError> {
        named(&self.by_name, name)
    }
}

fn named(by_name: &HashMap<&'static str, Kernel>, name: &str) -> Result<Kernel, BackendError> {
    let kernel = by_name.get(name).copied();
    kernel.ok_or_else(|| device_error(format!("there is no kernel '{name}'")))
}

/// Lets a kernel without shared memory run where others have it: a multiprocessor divides its cache anew only when it is idle,
/// so that what is launched beside the kernel would have to wait for its end.
fn leave_shared_memory(function: CUfunction, name: &str) -> Result<(), BackendError> {
    let (which, most) = (Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100);
    // SAFETY: the function is loaded.
    let status = unsafe { sys::cuFuncSetAttribute(function, which, most) };
    check(status, &format!("choosing the shared memory of '{name}'"))
}

fn raise_shared_limit(
    function: CUfunction,
    name: &str,
    shared_per_block: u32,
) -> Result<u32, BackendError> {
    let mut fixed = 0;
    // SAFETY: the function is loaded; `fixed` is written.
    let status = unsafe {
        sys::cuFuncGetAttribute(
            &raw mut fixed,
            Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            function,
        )
    };
    check(status, &format!("asking for the shared memory of '{name}'"))?;
    let limit = shared_per_block.saturating_sub(fixed as u32);
    // SAFETY: the function is loaded.
    let status = unsafe {
        sys::cuFuncSetAttribute(
            function,
            Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            limit as i32,
        )
    };
    check(status, &format!("raising the shared memory of '{name}'"))?;
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_in_its_source() {
        for (source, names) in NAMES {
            let (_, text) = compile::SOURCES.iter().find(|(n, _)| n == source).unwrap();
            for name in *names {
                let base = name.trim_end_matches(|c: char| c.is_ascii_digit());
                assert!(
                    text.contains(name) || text.contains(base),
                    "'{name}' is not in {source}.cu"
                );
            }
        }
    }

    /// Every kernel that a source defines, by itself or by a macro, can be found by its name.
    #[test]
    fn every_kernel_of_a_source_is_named() {
        for (source, names) in NAMES {
            let (_, text) = compile::SOURCES.iter().find(|(n, _)| n == source).unwrap();
            let text = text.replace('\\', " ");
            let mut defined = Vec::new();
            for definition in text.split("extern \"C\" __global__ void").skip(1) {
                // After its attributes, whose parentheses may hold others.
                let mut rest = definition.trim_start();
                while rest.starts_with("__") {
                    let mut depth = 0;
                    let end = rest.find(|c: char| {
                        depth += i32::from(c == '(') - i32::from(c == ')');
                        c == ')' && depth == 0
                    });
                    rest = rest[end.unwrap() + 1..].trim_start();
                }
                defined.push(rest.split('(').next().unwrap().trim());
            }
            let macros = text.lines().filter_map(|line| line.strip_prefix("#define "));
            let macros: Vec<&str> =
                macros.filter_map(|m| m.split_once("(name")).map(|m| m.0).collect();
            for line in text.lines() {
                let Some((called, rest)) = line.split_once('(') else { continue };
                if macros.contains(&called) {
                    defined.push(rest.split(',').next().unwrap());
                }
            }
            defined.retain(|name| *name != "name");
            assert!(!defined.is_empty(), "{source}");
            for name in defined {
                assert!(names.contains(&name), "'{name}' of {source}.cu is not named");
            }
        }
    }
}
