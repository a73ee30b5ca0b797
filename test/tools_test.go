package test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// generated runs a script of docs/generate on the program.
func generated(t *testing.T, script, kind string) string {
	t.Helper()
	out, stderr, code := runCmd(t, exec.Command("sh", "docs/generate/"+script, kind, program))
	if code != 0 || stderr != "" {
		t.Fatalf("%s %s: exit %d: %s", script, kind, code, stderr)
	}
	return out
}

// --- man pages

// rendered is a page as a terminal of 80 columns shows it.
func rendered(t *testing.T, page string) string {
	t.Helper()
	if _, err := exec.LookPath("mandoc"); err != nil {
		t.Skip("SKIPPED: mandoc is not installed")
	}
	cmd := exec.Command("mandoc", "-T", "ascii", "-O", "width=78")
	cmd.Stdin = strings.NewReader(page)
	out, stderr, code := runCmd(t, cmd)
	if code != 0 {
		t.Fatalf("mandoc: exit %d: %s", code, stderr)
	}
	return regexp.MustCompile(`.\x08`).ReplaceAllString(out, "")
}

func TestManPagesAreWellFormed(t *testing.T) {
	t.Parallel()
	for kind, wanted := range map[string]string{
		"hamlet":   "NAME SYNOPSIS DESCRIPTION COMMANDS ENVIRONMENT FILES EXIT STATUS SIGNALS SEE ALSO",
		"handlers": "NAME DESCRIPTION SPECS ENVIRONMENT INPUT OUTPUT SEE ALSO",
	} {
		page := generated(t, "man.sh", kind)
		text := rendered(t, page)
		for _, section := range strings.Split(strings.NewReplacer("EXIT STATUS", "EXIT_STATUS", "SEE ALSO", "SEE_ALSO").Replace(wanted), " ") {
			if section = strings.ReplaceAll(section, "_", " "); !strings.Contains(text, "\n"+section+"\n") {
				t.Errorf("%s: there is no section %s", kind, section)
			}
		}
		for line := range strings.Lines(text) {
			if len(line) > 81 {
				t.Errorf("%s: more than 80 columns: %q", kind, line)
			}
		}
		cmd := exec.Command("mandoc", "-T", "lint")
		cmd.Stdin = strings.NewReader(page)
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v: %s", kind, err, out)
		}
		// Mandoc on other systems may not be there: groff must take them as well.
		if odd := regexp.MustCompile(`(?m)^\.[a-z]{2,} *.*$`).FindAllString(page, -1); slices.ContainsFunc(odd, func(s string) bool {
			return !slices.Contains([]string{".nf", ".fi", ".br", ".in", ".in 2", ".in 4"}, s)
		}) {
			t.Errorf("%s: requests beyond man(7): %q", kind, odd)
		}
	}
}

// words are those of a text, whatever their lines and indents.
func words(text string) string { return strings.Join(strings.Fields(text), " ") }

func TestManPageHoldsTheHelpOfEveryCommand(t *testing.T) {
	t.Parallel()
	text := words(rendered(t, generated(t, "man.sh", "hamlet")))
	for _, name := range commandNames(t) {
		for line := range strings.Lines(helpOf(t, name)) {
			if line = words(strings.TrimPrefix(line, "Usage: ")); !strings.Contains(text, line) {
				t.Errorf("what help says of %s is missing: %q", name, line)
			}
		}
	}
}

func TestManPageHoldsTheHandlersContract(t *testing.T) {
	t.Parallel()
	text := words(rendered(t, generated(t, "man.sh", "handlers")))
	count := 0
	for line := range strings.Lines(readFile("docs/handlers.md")) {
		line = strings.NewReplacer("`", "", "**", "").Replace(line)
		if line = words(strings.TrimPrefix(line, "- ")); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		count++
		if !strings.Contains(text, line) && line != "sh" && line != "console" {
			t.Errorf("the page lacks %q", line)
		}
	}
	if count < 80 {
		t.Errorf("the contract has only %d lines", count)
	}
}

func TestHelpFitsATerminal(t *testing.T) {
	t.Parallel()
	for _, name := range append(commandNames(t), "") {
		text := helpOf(t, name)
		for line := range strings.Lines(text) {
			if n := len(strings.ReplaceAll(strings.TrimSuffix(line, "\n"), "\t", "    ")); n > 80 {
				t.Errorf("help %s: a line of %d columns: %q", name, n, line)
			}
		}
		if name != "" && !strings.HasPrefix(text, "Usage: hamlet "+name) {
			t.Errorf("help %s does not begin with its usage: %.60q", name, text)
		}
	}
}

// --- completion

func TestCompletionOfBashKnowsCommandsOptionsAndValues(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("SKIPPED: bash is not installed")
	}
	file := filepath.Join(t.TempDir(), "hamlet")
	if err := os.WriteFile(file, []byte(generated(t, "completion.sh", "bash")), 0o644); err != nil {
		t.Fatal(err)
	}
	for typed, want := range map[string]string{
		"mem":                        "members",
		"l":                          "leave",
		"help forc":                  "force-leave",
		"agent -retry-j":             "-retry-join",
		"members -stat":              "-status",
		"members -format j":          "json",
		"agent -log-level d":         "debug",
		"tags -set x":                "",
		"query $(touch$IFS'canary')": "",
	} {
		script := `. "$1"; COMP_WORDS=(hamlet $2); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _hamlet; echo ${COMPREPLY[*]}`
		cmd := exec.Command("bash", "--norc", "-c", script, "bash", file, typed)
		cmd.Dir = filepath.Dir(file)
		if out, err := cmd.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != want {
			t.Errorf("hamlet %s: %q, %v; want %q", typed, out, err, want)
		}
	}
	if files, _ := filepath.Glob(filepath.Join(filepath.Dir(file), "*")); len(files) != 1 {
		t.Errorf("what was typed was run: %q", files)
	}
	text := readFile(file)
	for _, name := range commandNames(t) {
		for _, m := range regexp.MustCompile(`(?m)^  (-[a-z-]+)`).FindAllStringSubmatch(helpOf(t, name), -1) {
			if !regexp.MustCompile(`\t` + name + `\) words=".*` + m[1] + ` `).MatchString(text) {
				t.Errorf("hamlet %s %s is not completed", name, m[1])
			}
		}
	}
}

// Zsh's own functions are replaced by ones that show what they are told.
func TestCompletionOfZshKnowsCommandsOptionsAndValues(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("zsh"); err != nil {
		t.Skip("SKIPPED: zsh is not installed")
	}
	file := filepath.Join(t.TempDir(), "_hamlet")
	if err := os.WriteFile(file, []byte(generated(t, "completion.sh", "zsh")), 0o644); err != nil {
		t.Fatal(err)
	}
	ask := func(typed string) string {
		t.Helper()
		script := `_arguments() { print -rl -- "$@"; }; _describe() { print -rl -- "${(@P)2}"; }
			words=(hamlet ${=2}); CURRENT=${#words}; source $1`
		out, err := exec.Command("zsh", "-f", "-c", script, "zsh", file, typed).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", typed, err, out)
		}
		return "\n" + string(out)
	}
	list := ask("x")
	for _, name := range commandNames(t) {
		if !strings.Contains(list, "\n"+name+":") {
			t.Errorf("the command %s is not completed", name)
		}
		options := regexp.MustCompile(`(?m)^  (-[a-z-]+)`).FindAllStringSubmatch(helpOf(t, name), -1)
		if len(options) == 0 {
			continue
		}
		told := ask(name + " -")
		for _, m := range options {
			if !strings.Contains(told, "\n"+m[1]+"[") && !strings.Contains(told, "\n*"+m[1]+"[") {
				t.Errorf("hamlet %s %s is not completed:%s", name, m[1], told)
			}
		}
	}
	if !strings.Contains(ask("agent -"), "(trace debug info warn err)\n") || !strings.Contains(ask("agent -"), "\n*-join[") {
		t.Error("values, or options that may come again, are missing")
	}
}

// --- install and release

// makeIn runs make in a copy of the source.
func makeIn(t *testing.T, dir string, env []string, args ...string) string {
	t.Helper()
	cmd := exec.Command("make", append([]string{"-s", "-C", dir}, args...)...)
	cmd.Env = append(hamletCmd().Env, env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make %v: %v: %s", args, err, out)
	}
	return string(out)
}

// sourceCopy copies what a release is made of into a directory.
func sourceCopy(t *testing.T, dir string) string {
	t.Helper()
	var paths []string
	for _, pattern := range []string{"*.go", "go.*", "Makefile", "*.md", "LICENSE", "docs/*.md", "docs/*.txt", "docs/generate/*"} {
		found, _ := filepath.Glob(pattern)
		paths = append(paths, found...)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		to := filepath.Join(dir, path)
		if err := errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, text, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// filesUnder are the paths of the files in a directory, and their modes.
func filesUnder(t *testing.T, dir string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		name, _ := filepath.Rel(dir, path)
		files = append(files, info.Mode().String()+" "+name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestInstallPutsAllInItsPlaceAndUninstallRemovesIt(t *testing.T) {
	t.Parallel()
	dir := sourceCopy(t, t.TempDir())
	built, err := os.ReadFile(program)
	if err := errors.Join(err, os.WriteFile(filepath.Join(dir, "hamlet"), built, 0o755)); err != nil {
		t.Fatal(err)
	}
	stage := filepath.Join(t.TempDir(), "a stage")
	where := []string{"DESTDIR=" + stage, "PREFIX=/opt/hamlet"}
	noGo := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"} // as sudo may have it: what is built needs no Go
	makeIn(t, dir, noGo, append([]string{"install"}, where...)...)

	want := []string{
		"-rwxr-xr-x opt/hamlet/bin/hamlet",
		"-rw-r--r-- opt/hamlet/share/bash-completion/completions/hamlet",
		"-rw-r--r-- opt/hamlet/share/man/man1/hamlet.1",
		"-rw-r--r-- opt/hamlet/share/man/man7/hamlet-handlers.7",
		"-rw-r--r-- opt/hamlet/share/zsh/site-functions/_hamlet",
	}
	if got := filesUnder(t, stage); !slices.Equal(got, want) {
		t.Errorf("installed are %q", got)
	}
	out, _, code := runCmd(t, exec.Command(filepath.Join(stage, "opt/hamlet/bin/hamlet"), "version"))
	if code != 0 || !strings.HasPrefix(out, "hamlet ") {
		t.Errorf("the installed one says %q", out)
	}
	makeIn(t, dir, noGo, append([]string{"uninstall"}, where...)...)
	if left := filesUnder(t, stage); len(left) > 0 {
		t.Errorf("left are %q", left)
	}
}

// For this platform, since each takes a while; the paths of the two sources differ.
func TestReleaseIsTheSameBytesTwice(t *testing.T) {
	t.Parallel()
	platform := runtime.GOOS + "/" + runtime.GOARCH
	if runtime.GOARCH == "arm" {
		platform += "v6"
	}
	var sums [2]string
	for i := range sums {
		dir := sourceCopy(t, filepath.Join(t.TempDir(), strings.Repeat("x", 1+7*i)))
		makeIn(t, dir, []string{"VERSION=1.2.3"}, "release", "PLATFORMS="+platform)
		sums[i] = readFile(filepath.Join(dir, "dist/SHA256SUMS"))
	}
	if sums[0] != sums[1] {
		t.Errorf("once:\n%sand again:\n%s", sums[0], sums[1])
	}
	for _, name := range []string{"hamlet-" + strings.Replace(platform, "/", "-", 1), "hamlet.1", "hamlet-handlers.7", "hamlet.bash", "_hamlet", "LICENSE", "CHANGELOG.md"} {
		if !regexp.MustCompile(`(?m)^[0-9a-f]{64}  ` + regexp.QuoteMeta(name) + `$`).MatchString(sums[0]) {
			t.Errorf("SHA256SUMS lacks %s:\n%s", name, sums[0])
		}
	}
}
