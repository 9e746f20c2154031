//! cuBLASLt: one algorithm pinned per matrix product, chosen at load among those that give a row the same bits at every
//! number of rows.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use ampoule_backend::BackendError;
use ampoule_plan::{DType, View};
use cudarc::cublaslt::sys::{self, cublasStatus_t as Status};

use crate::device::CudaOptions;
use crate::driver::{Context, DeviceMemory, Event, Launch};
use crate::launch::arguments::{MatrixView, dtype_code};
use crate::launch::{Launcher, args, product_shape};
use crate::libs;
use crate::memory::Resident;

/// Bytes of working memory that algorithms may use.
pub(crate) const WORKSPACE: usize = 32 << 20;
/// Algorithms asked for, and of those that qualify, timed.
const CANDIDATES: usize = 96;
const TIMED: usize = 48;
/// Rows that the check repeats.
const PERIOD: usize = 8;

/// `out[rows, n] (+)= x[rows, k] * w[n, k]^T`, all row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProductShape {
    pub(crate) rows: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) ld_x: usize,
    pub(crate) ld_out: usize,
    pub(crate) operand: DType,
    pub(crate) out: DType,
}

/// The library.
pub(crate) struct Lt {
    handle: sys::cublasLtHandle_t,
    version: usize,
    context: Arc<Context>,
}

// SAFETY: cuBLASLt handles may be used from any thread.
unsafe impl Send for Lt {}
// SAFETY: as above.
unsafe impl Sync for Lt {}

fn check(status: Status, what: &str) -> Result<(), BackendError> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(error(format!("{what}: {status:?}")))
}

fn error(problem: String) -> BackendError {
    BackendError::Device { device: "cuBLASLt".to_owned(), problem }
}

impl Lt {
    /// Opens the library.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, BackendError> {
        libs::cublaslt()?;
        context.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the library is loaded; the context is current; `handle` is written.
        check(unsafe { sys::cublasLtCreate(&raw mut handle) }, "opening the library")?;
        // SAFETY: the library is loaded.
        let version = unsafe { sys::cublasLtGetVersion() };
        Ok(Self { handle, version, context: Arc::clone(context) })
    }

    /// The library's version number.
    pub(crate) const fn version(&self) -> usize {
        self.version
    }

    /// Enqueues a product on the program's stream.
    ///
    /// # Safety
    /// The addresses must be of matrices with the product's shape and leading dimensions.
    pub(crate) unsafe fn multiply(
        &self,
        product: &Product,
        x: u64,
        w: u64,
        out: u64,
        add: bool,
        resident: &Resident,
    ) -> Result<(), BackendError> {
        self.context.enter()?;
        let (alpha, beta) = (1.0_f32, if add { 1.0_f32 } else { 0.0 });
        let address = |a: u64| a as *const c_void;
        // SAFETY: descriptors and algorithm were made for each other; the workspace has WORKSPACE bytes; the matrices
        // are the caller's promise; alpha and beta are host scalars read during the call.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                product.plan.operation,
                (&raw const alpha).cast(),
                address(w),
                product.plan.a,
                address(x),
                product.plan.b,
                (&raw const beta).cast(),
                address(out),
                product.plan.d,
                out as *mut c_void,
                product.plan.d,
                &raw const product.algorithm,
                resident.product.at() as *mut c_void,
                WORKSPACE,
                resident.stream.raw().cast(),
            )
        };
        check(status, &format!("product {:?}", product.shape))
    }
}

impl Drop for Lt {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: created once, destroyed once.
            unsafe { sys::cublasLtDestroy(self.handle) };
        }
    }
}

/// Descriptors of a product.
struct Descriptors {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
}

impl Descriptors {
    fn new(shape: &ProductShape) -> Result<Self, BackendError> {
        let mut this = Self {
            operation: ptr::null_mut(),
            a: ptr::null_mut(),
            b: ptr::null_mut(),
            d: ptr::null_mut(),
        };
        let scale = sys::cudaDataType::CUDA_R_32F;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: `operation` is written.
        let status =
            unsafe { sys::cublasLtMatmulDescCreate(&raw mut this.operation, compute, scale) };
        check(status, "describing a product")?;
        // Column-major, as the library sees it: out^T [n, rows] = (w^T)^T [n, k] * x^T [k, rows].
        let transposed = 1_i32; // CUBLAS_OP_T
        // SAFETY: the attribute is of this type.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(
                this.operation,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of_val(&transposed),
            )
        };
        check(status, "describing a product")?;
        let layout = |dtype, rows: usize, cols: usize, ld: usize| {
            let mut layout = ptr::null_mut();
            // SAFETY: `layout` is written.
            let status = unsafe {
                sys::cublasLtMatrixLayoutCreate(
                    &raw mut layout,
                    data_type(dtype),
                    rows as u64,
                    cols as u64,
                    ld as i64,
                )
            };
            check(status, "describing a matrix").map(|()| layout)
        };
        this.a = layout(shape.operand, shape.k, shape.n, shape.k)?;
        this.b = layout(shape.operand, shape.k, shape.rows, shape.ld_x)?;
        this.d = layout(shape.out, shape.n, shape.rows, shape.ld_out)?;
        Ok(this)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: each was created once and is destroyed once.
        unsafe {
            if !self.operation.is_null() {
                sys::cublasLtMatmulDescDestroy(self.operation);
            }
            for layout in [self.a, self.b, self.d] {
                if !layout.is_null() {
                    sys::cublasLtMatrixLayoutDestroy(layout);
                }
            }
        }
    }
}

const fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

/// A product with its algorithm.
pub(crate) struct Product {
    shape: ProductShape,
    plan: Descriptors,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptors are plain host objects, never changed after they are made.
unsafe impl Send for Product {}
// SAFETY: as above.
unsafe impl Sync for Product {}

/// The products of a model, by plan and op. What is not in here goes to the float32 kernel.
#[derive(Default)]
pub(crate) struct Products {
    by_op: HashMap<(usize, usize), Arc<Product>>,
}

/// Rows of one weight's product by the algorithm that all others must match.
struct Reference {
    rows: DeviceMemory,
    period: usize,
}

impl Products {
    /// The product of an op, if cuBLASLt takes it.
    pub(crate) fn find(&self, plan: usize, op: usize) -> Option<&Product> {
        self.by_op.get(&(plan, op)).map(Arc::as_ref)
    }

    /// Chooses an algorithm for every product of the model. Uses the plans' own buffers, whose contents do not matter
    /// yet, and the resident weights.
    pub(crate) fn choose(resident: &Resident, options: CudaOptions) -> Result<Self, BackendError> {
        let mut products = Self::default();
        let Some(lt) = &resident.device.lt else { return Ok(products) };
        let model = resident.model.model();
        let mut wanted = Vec::new();
        for (p, plan) in model.plans.iter().enumerate() {
            for (i, op) in plan.ops.iter().enumerate() {
                if let Some((shape, x, w, out)) = product_shape(&model.buffers, plan.key.phase, op)
                {
                    wanted.push((shape, p, i, x, w, out));
                }
            }
        }
        // Fewest rows first: the reference of a weight's shape is made by its smallest product.
        wanted.sort_by_key(|(shape, p, i, ..)| (shape.rows, *p, *i));
        let chooser = Chooser { resident, lt, options };
        let mut references: HashMap<(usize, usize, DType, DType), Option<Reference>> =
            HashMap::new();
        let mut chosen: HashMap<ProductShape, Option<Arc<Product>>> = HashMap::new();
        let mut pools: HashMap<(usize, DType, DType), Vec<sys::cublasLtMatmulAlgo_t>> =
            HashMap::new();
        let mut asked = std::collections::HashSet::new();
        for (shape, _, _, x, w, out) in &wanted {
            if asked.insert(*shape) {
                let pool = pools.entry((shape.rows, shape.operand, shape.out)).or_default();
                for algorithm in chooser.candidates(shape, chooser.alignments(x, w, out))? {
                    if pool.iter().all(|a| bytes_of_algorithm(a) != bytes_of_algorithm(&algorithm))
                    {
                        pool.push(algorithm);
                    }
                }
            }
        }
        for (shape, p, i, x, w, out) in &wanted {
            let family = (shape.n, shape.k, shape.operand, shape.out);
            if !chosen.contains_key(shape) {
                let others = pools.get(&(shape.rows, shape.operand, shape.out));
                let others = others.map_or(&[][..], Vec::as_slice);
                let product = chooser.choose(shape, x, w, out, references.get(&family), others)?;
                let found = product.map(|(product, reference)| {
                    if let Some(reference) = reference {
                        references.insert(family, Some(reference));
                    }
                    Arc::new(product)
                });
                if found.is_none() {
                    // No algorithm gives this family equal bits: all of it goes the float32 way.
                    references.insert(family, None);
                }
                chosen.insert(*shape, found);
            }
            if let Some(Some(product)) = chosen.get(shape) {
                products.by_op.insert((*p, *i), Arc::clone(product));
            }
        }
        products.by_op.retain(|_, product| {
            let s = &product.shape;
            references.get(&(s.n, s.k, s.operand, s.out)).is_some_and(Option::is_some)
        });
        Ok(products)
    }
}

struct Chooser<'a> {
    resident: &'a Resident,
    lt: &'a Lt,
    options: CudaOptions,
}

impl Chooser<'_> {
    /// To how many bytes the matrices are aligned, as the library asks: weights, x, out twice.
    fn alignments(&self, x: &View, w: &View, out: &View) -> [u32; 4] {
        [w, x, out, out].map(|v| 1_u32 << self.resident.view_address(v).trailing_zeros().min(8))
    }

    /// The fastest algorithm that qualifies; also the reference, if there is none of this weight's shape yet.
    fn choose(
        &self,
        shape: &ProductShape,
        x: &View,
        w: &View,
        out: &View,
        reference: Option<&Option<Reference>>,
        pool: &[sys::cublasLtMatmulAlgo_t],
    ) -> Result<Option<(Product, Option<Reference>)>, BackendError> {
        if let Some(None) = reference {
            return Ok(None);
        }
        let at = |v: &View| self.resident.view_address(v);
        let (x_at, w_at, out_at) = (at(x), at(w), at(out));
        let aligned = self.alignments(x, w, out);
        let mut candidates = self.candidates(shape, aligned)?;
        // The library's guesses are few; algorithms guessed for other shapes of as many rows are tried, too.
        let own: Vec<_> = candidates.iter().map(bytes_of_algorithm).collect();
        candidates.extend(pool.iter().filter(|a| !own.contains(&bytes_of_algorithm(a))));
        let period = match reference {
            Some(Some(reference)) => reference.period,
            _ => PERIOD.min(shape.rows),
        };
        self.fill_rows(shape, x_at, period)?;
        let mut made = None;
        let mut best: Option<(f32, Product)> = None;
        let mut timed = 0;
        while !candidates.is_empty() && timed < TIMED {
            let algorithm = candidates.remove(0);
            let product = Product { shape: *shape, plan: Descriptors::new(shape)?, algorithm };
            // SAFETY: the views are the op's own, of this shape.
            let run =
                || unsafe { self.lt.multiply(&product, x_at, w_at, out_at, false, self.resident) };
            if run().is_err() {
                continue;
            }
            let result = MatrixView::new(out_at, shape.ld_out, shape.out);
            let rows = match (reference, &made) {
                (Some(Some(reference)), _) => reference.rows.at(),
                (_, Some(Reference { rows, .. })) => rows.at(),
                _ => {
                    made = Some(self.keep_rows(shape, out_at, period)?);
                    made.as_ref().map_or(0, |m: &Reference| m.rows.at())
                }
            };
            let expected = MatrixView::new(rows, shape.n, shape.out);
            let same = self.differences(result, expected, shape, period)? == 0;
            if self.options.trace {
                let (tile, stages) = described(&product.algorithm)?;
                eprintln!(
                    "ampoule-cuda: {} x {} x {}: tile {tile}, stages {stages}, {:.1} us{}",
                    shape.rows,
                    shape.n,
                    shape.k,
                    self.time(&run)? * 1e3,
                    if same { "" } else { ", other bits" }
                );
            }
            if !same {
                continue;
            }
            timed += 1;
            if !self.options.tune {
                best = Some((0.0, product));
                break;
            }
            let time = self.time(&run)?;
            if best.as_ref().is_none_or(|(t, _)| time < *t) {
                best = Some((time, product));
            }
        }
        Ok(best.map(|(_, product)| (product, made)))
    }

    /// Algorithms without split-K and reduction, best guess first.
    fn candidates(
        &self,
        shape: &ProductShape,
        aligned: [u32; 4],
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, BackendError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let plan = Descriptors::new(shape)?;
        let preference = SearchPreference::new()?;
        let none = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        preference
            .set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64))?;
        preference.set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none)?;
        for (attribute, bytes) in [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ]
        .into_iter()
        .zip(aligned)
        {
            preference.set(attribute, &bytes)?;
        }
        // SAFETY: plain data without invalid bit patterns, overwritten by the library as far as it says.
        let mut results: Vec<sys::cublasLtMatmulHeuristicResult_t> =
            (0..CANDIDATES).map(|_| unsafe { std::mem::zeroed() }).collect();
        let mut count = 0;
        // SAFETY: all descriptors are alive; `results` has room for CANDIDATES.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.lt.handle,
                plan.operation,
                plan.a,
                plan.b,
                plan.d,
                plan.d,
                preference.0,
                CANDIDATES as i32,
                results.as_mut_ptr(),
                &raw mut count,
            )
        };
        if status == Status::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        check(status, &format!("choosing an algorithm for {shape:?}"))?;
        results.truncate(count.max(0) as usize);
        let mut algorithms = Vec::new();
        for result in results {
            let usable =
                result.state == Status::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE;
            if usable && unsplit(&result.algo)? {
                algorithms.push(result.algo);
            }
        }
        Ok(algorithms)
    }

    fn fill_rows(&self, shape: &ProductShape, x: u64, period: usize) -> Result<(), BackendError> {
        let launcher = Launcher::plain(self.resident);
        let view = MatrixView::new(x, shape.ld_x, shape.operand);
        let (rows, cols, period) = (shape.rows as i64, shape.k as i32, period as i32);
        let (seed, half_width) = (0x5eed_u64 ^ shape.k as u64, 1.0_f32);
        let grid = [launcher.blocks_for(shape.rows * shape.k), 1, 1];
        launcher.go(
            "periodic_fill",
            Launch::new(grid, 256),
            args![view, rows, cols, period, seed, half_width],
        )
    }

    /// Copies the first rows of a result aside.
    fn keep_rows(
        &self,
        shape: &ProductShape,
        out: u64,
        period: usize,
    ) -> Result<Reference, BackendError> {
        let element = shape.out.block_bytes();
        let bytes = period * shape.n * element;
        let rows =
            DeviceMemory::new(&self.resident.device.context, bytes, "checking matrix products")?;
        let launcher = Launcher::plain(self.resident);
        let (source, to, count, row) = (out, rows.at(), period as i64, (shape.n * element) as i64);
        let (source_stride, unit) = ((shape.ld_out * element) as i64, 2_i32);
        let grid = [launcher.blocks_for(bytes / 2), 1, 1];
        launcher.go(
            "copy_rows",
            Launch::new(grid, 256),
            args![source, to, count, row, source_stride, row, unit],
        )?;
        Ok(Reference { rows, period })
    }

    fn differences(
        &self,
        result: MatrixView,
        expected: MatrixView,
        shape: &ProductShape,
        period: usize,
    ) -> Result<u32, BackendError> {
        debug_assert_eq!(result.dtype, dtype_code(shape.out));
        let counter = self.resident.product.at();
        // SAFETY: the workspace is larger than a word; the product that used it comes before in the stream.
        unsafe { self.resident.stream.fill(counter, 0, 1)? };
        let launcher = Launcher::plain(self.resident);
        let (rows, cols, period) = (shape.rows as i64, shape.n as i64, period as i32);
        let grid = [launcher.blocks_for(shape.rows * shape.n), 1, 1];
        launcher.go(
            "count_differences",
            Launch::new(grid, 256),
            args![result, expected, rows, cols, period, counter],
        )?;
        let mut count = [0_u8; 4];
        // SAFETY: `count` lives until the stream is synchronised below; the source is a word of the workspace.
        unsafe { self.resident.stream.download(count.as_mut_ptr(), counter, 4)? };
        self.resident.stream.synchronize()?;
        Ok(u32::from_le_bytes(count))
    }

    /// Milliseconds of the fastest of three runs.
    fn time(&self, run: &impl Fn() -> Result<(), BackendError>) -> Result<f32, BackendError> {
        let context = &self.resident.device.context;
        let (start, end) = (Event::new(context, true)?, Event::new(context, true)?);
        let mut best = f32::INFINITY;
        for _ in 0..3 {
            start.record(&self.resident.stream)?;
            run()?;
            end.record(&self.resident.stream)?;
            end.synchronize()?;
            best = best.min(end.milliseconds_since(&start)?);
        }
        Ok(best)
    }
}

/// What tells algorithms apart.
fn bytes_of_algorithm(algorithm: &sys::cublasLtMatmulAlgo_t) -> [u64; 8] {
    algorithm.data
}

/// Whether the algorithm sums each element in one piece.
fn unsplit(algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<bool, BackendError> {
    use sys::cublasLtMatmulAlgoConfigAttributes_t as Config;
    let pieces = ask(algorithm, Config::CUBLASLT_ALGO_CONFIG_SPLITK_NUM)?;
    let reduction = ask(algorithm, Config::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)?;
    Ok(pieces <= 1 && reduction == 0)
}

/// The library's numbers of an algorithm's tile and stages.
fn described(algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<(u32, u32), BackendError> {
    use sys::cublasLtMatmulAlgoConfigAttributes_t as Config;
    let tile = ask(algorithm, Config::CUBLASLT_ALGO_CONFIG_TILE_ID)?;
    Ok((tile, ask(algorithm, Config::CUBLASLT_ALGO_CONFIG_STAGES_ID)?))
}

fn ask(
    algorithm: &sys::cublasLtMatmulAlgo_t,
    attribute: sys::cublasLtMatmulAlgoConfigAttributes_t,
) -> Result<u32, BackendError> {
    let mut value = 0_u32;
    let mut written = 0;
    // SAFETY: the callers ask for attributes that are 32 bits wide; `value` and `written` are written.
    let status = unsafe {
        sys::cublasLtMatmulAlgoConfigGetAttribute(
            algorithm,
            attribute,
            (&raw mut value).cast(),
            4,
            &raw mut written,
        )
    };
    check(status, "asking about an algorithm").map(|()| value)
}

/// Search preferences, destroyed when dropped.
struct SearchPreference(sys::cublasLtMatmulPreference_t);

impl SearchPreference {
    fn new() -> Result<Self, BackendError> {
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is written.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut raw) }, "making a preference")?;
        Ok(Self(raw))
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), BackendError> {
        // SAFETY: the callers pass each attribute's own type.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(
                self.0,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        check(status, "setting a preference")
    }
}

impl Drop for SearchPreference {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}
