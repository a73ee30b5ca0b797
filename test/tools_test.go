package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestTheManPageHoldsTheHelpOfEveryCommand(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Symlink(program, filepath.Join(dir, "hamlet")); err != nil {
		t.Fatal(err)
	}
	source, _ := os.Getwd()
	// The binary is built already; and the page is written there, not here.
	cmd := exec.Command("make", "-s", "-C", dir, "-f", filepath.Join(source, "Makefile"), "-o", "build", "man")
	cmd.Env = hamletCmd().Env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	page := readFile(filepath.Join(dir, "hamlet.1"))
	sections := make(map[string]string)
	for _, section := range strings.Split(page, "\n.SH ")[1:] {
		title, text, _ := strings.Cut(section, "\n.nf\n")
		text = strings.NewReplacer(`\-`, "-", `\&`, "", `\e`, `\`).Replace(text)
		sections[strings.ToLower(title)] = strings.TrimSuffix(strings.TrimSuffix(text, "\n"), ".fi")
	}
	if sections["synopsis"] != helpOf(t, "") {
		t.Errorf("its synopsis is not what help says:\n%s", sections["synopsis"])
	}
	for _, name := range commandNames(t) {
		if sections["hamlet "+name] != helpOf(t, name) {
			t.Errorf("what it says of %s is not what help says: %q", name, sections["hamlet "+name])
		}
	}
}
